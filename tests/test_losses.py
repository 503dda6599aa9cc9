"""The losses by hand: one pair worked on paper, limits, gradients and identities.

The pair, worked once and used throughout (beta 0.1 unless said):
    pi  = (-8, -15), ref = (-10, -12), lengths (4, 6)
    log ratios: chosen -8 + 10 = 2, rejected -15 + 12 = -3, h = 2 + 3 = 5, beta h = 0.5
    log ratios per token: 2/4 = 0.5, -3/6 = -0.5, their difference 1
Agreement with TRL's own code is in test_trl_parity.py.
"""

import math

import mlx.core as mx
import pytest
from dpo_mlx.config import DpoConfig
from dpo_mlx.scoring.losses import LOSSES, Sides, objective, preference_loss, rewards

PI, REF, LENGTH = (-8.0, -15.0), (-10.0, -12.0), (4.0, 6.0)


def sides(pair):
    return Sides(*(mx.array(value) for value in pair))


def loss_of(name, pi=PI, ref=REF, length=LENGTH, **settings):
    value = objective(
        sides(pi),
        sides(ref),
        sides(length),
        DpoConfig(loss=name, **{"beta": 0.1, "nll_weight": 0.0} | settings),
    )
    return value.item() if value.ndim == 0 else value.tolist()


def slopes_of(name, pi=PI, ref=REF, length=LENGTH, **settings):
    """(dL/d pi_chosen, dL/d pi_rejected)."""
    config = DpoConfig(loss=name, **{"beta": 0.1, "nll_weight": 0.0} | settings)

    def loss(chosen, rejected):
        return objective(Sides(chosen, rejected), sides(ref), sides(length), config)

    return [g.item() for g in mx.grad(loss, argnums=(0, 1))(*sides(pi))]


def sigma(x):
    return 1 / (1 + math.exp(-x))


BY_HAND = [
    # -log sigma(0.5) = ln(1 + e^-0.5) = ln 1.6065307
    ("sigmoid", {}, 0.4740770),
    # beta h = 2.5: ln(1 + e^-2.5) = ln 1.0820850
    ("sigmoid", {"beta": 0.5}, 0.0788897),
    # -log sigma(-x) = -log sigma(x) + x, so smoothing e adds e x: 0.4740770 + 0.1 x 0.5
    ("sigmoid", {"label_smoothing": 0.1}, 0.5240770),
    # (0.9 l - 0.1 (l + 0.5)) / 0.8 = l - 0.05 / 0.8 = 0.4740770 - 0.0625
    ("robust", {"label_smoothing": 0.1}, 0.4115770),
    ("robust", {}, 0.4740770),
    # 1 - 0.5
    ("hinge", {}, 0.5),
    # 1 - 2.5 < 0
    ("hinge", {"beta": 0.5}, 0.0),
    # (1 - 1 / 0.2)^2 = (-4)^2
    ("ipo", {}, 16.0),
    # the target is 1 / (2 beta) = 1: reached
    ("ipo", {"beta": 0.5}, 0.0),
    # ln(1 + e^-0.1) = ln 1.9048374
    ("sigmoid_norm", {}, 0.6443967),
    # beta x 1 = 2: ln(1 + e^-2) = ln 1.1353353
    ("sigmoid_norm", {"beta": 2.0}, 0.1269280),
    # per token: -8/4 = -2, -15/6 = -2.5, margin 0.5; 2 x 0.5 - 1 = 0: ln 2
    ("simpo", {"beta": 2.0}, math.log(2)),
    # 2 x 0.5 - 0.5 = 0.5, the first line's number
    ("simpo", {"beta": 2.0, "simpo_gamma": 0.5}, 0.4740770),
    # 1 - sigma(0.2) + sigma(-0.3) = 1 - 0.5498340 + 0.4255575
    ("apo_zero", {}, 0.8757235),
    # sigma(0.2) + 1 - sigma(0.5) = 0.5498340 + 1 - 0.6224593
    ("apo_down", {}, 0.9273747),
    # chosen rose by 2: nothing to punish, DPO's value
    ("dpop", {}, 0.4740770),
    # the chosen answer's mean nll is 8 / 4 = 2: 0.5 x 2 on top
    ("sigmoid", {"nll_weight": 0.5}, 1.4740770),
]


@pytest.mark.parametrize(("name", "settings", "expected"), BY_HAND)
def test_by_hand(name, settings, expected):
    """Each loss on the pair of the module's docstring has the value worked on paper."""
    assert loss_of(name, **settings) == pytest.approx(expected, abs=1e-6)


def test_every_loss_is_worked_by_hand():
    """A loss added to the library needs a line in BY_HAND."""
    assert {name for name, _, _ in BY_HAND} == set(LOSSES)


def test_dpop_punishes_a_fallen_chosen_answer():
    """pi_chosen -11 is 1 below its reference: h = -1 + 3 = 2, and lambda x 1 is taken off it.

    lambda 50: 0.1 (2 - 50) = -4.8, ln(1 + e^4.8) = 4.8081968.
    lambda 2: 0.1 (2 - 2) = 0, ln 2.
    """
    assert loss_of("dpop", (-11.0, -15.0), dpop_lambda=50.0) == pytest.approx(4.8081968, rel=1e-6)
    assert loss_of("dpop", (-11.0, -15.0), dpop_lambda=2.0) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("sigmoid", lambda beta: math.log(2)),
        ("robust", lambda beta: math.log(2)),
        ("hinge", lambda beta: 1.0),
        ("ipo", lambda beta: 1 / (4 * beta**2)),
        ("sigmoid_norm", lambda beta: math.log(2)),
        ("apo_zero", lambda beta: 1.0),
        ("apo_down", lambda beta: 1.0),
        ("dpop", lambda beta: math.log(2)),
    ],
)
def test_at_the_reference(name, limit, beta):
    """Policy equal to reference, where every fresh run starts: the known first loss."""
    smoothing = 0.2 if name in ("sigmoid", "robust") else 0.0
    found = loss_of(name, REF, REF, beta=beta, label_smoothing=smoothing)
    assert found == pytest.approx(limit(beta), rel=1e-6)


def test_simpo_knows_no_reference():
    """Any reference gives SimPO's value; at equal log-probs per token it is -log sigma(-gamma)."""
    assert loss_of("simpo", ref=(-1.0, -99.0)) == loss_of("simpo")
    # ln(1 + e^1) = 1.3132617
    assert loss_of("simpo", (-4.0, -6.0), simpo_gamma=1.0) == pytest.approx(1.3132617, abs=1e-6)


def test_sigmoid_slopes_by_hand():
    """DPO's gradient weight: dL/d pi_chosen = -beta sigma(-beta h), and its negative."""
    weight = 0.1 * sigma(-0.5)
    assert slopes_of("sigmoid") == pytest.approx([-weight, weight], rel=1e-5)


def test_length_normalised_slopes_are_divided_by_length():
    """A longer answer's tokens pull less: the slopes of sigmoid_norm are 1/4 and 1/6 of a sum's."""
    weight = 2.0 * sigma(-2.0)
    found = slopes_of("sigmoid_norm", beta=2.0)
    assert found == pytest.approx([-weight / 4, weight / 6], rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pi", [REF, (-9.0, -13.0), (-10.5, -11.5)])
def test_descent_widens_the_margin(name, pi):
    """Following the negative gradient raises chosen over rejected, at and around the reference."""
    by_chosen, by_rejected = slopes_of(name, pi, dpop_lambda=5.0, label_smoothing=0.1)
    assert by_rejected > 0
    if name == "apo_down":  # both down, rejected further
        assert by_chosen >= -1e-3 and -by_rejected < -by_chosen
    else:
        assert by_chosen < 0


def test_apo_moves_each_side_as_its_paper_says():
    """At the reference apo_zero lifts chosen and lowers rejected; apo_down holds, then lowers both.

    sigma' = 1/4 at 0: apo_zero's slopes are -beta/4 and beta/4; apo_down's chosen slope is
    beta/4 - beta/4 = 0. With chosen unmoved and rejected at -30 nats, sigma'(beta h) is
    0.0451767 and the slope beta (1/4 - 0.0451767) = 0.0204823: chosen is lowered too.
    """
    assert slopes_of("apo_zero", REF) == pytest.approx([-0.025, 0.025], rel=1e-5)
    assert slopes_of("apo_down", REF) == pytest.approx([0.0, 0.025], abs=1e-6)
    lowered, _ = slopes_of("apo_down", (-10.0, -42.0))
    assert lowered == pytest.approx(0.0204823, rel=1e-4)


def test_cdpo_is_least_where_the_policy_believes_its_labels():
    """With smoothing e the gradient vanishes at sigma(beta h) = 1 - e: h = ln(0.9 / 0.1) / beta."""
    h = math.log(9) / 0.1
    found = slopes_of("sigmoid", (-10.0 + h, -12.0), label_smoothing=0.1)
    assert found == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("e", [0.05, 0.3])
def test_robust_is_unbiased_under_flips(e):
    """(1 - e) robust(pair) + e robust(flipped pair) = the loss of the clean label."""
    flipped = {"pi": PI[::-1], "ref": REF[::-1], "length": LENGTH[::-1]}
    expected = loss_of("sigmoid")
    found = (1 - e) * loss_of("robust", label_smoothing=e) + e * loss_of(
        "robust", label_smoothing=e, **flipped
    )
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_nll_weight_adds_the_mean_nll_to_any_loss(name):
    """The extra term is w x 8/4 nats, and its slope -w/4 falls on the chosen side alone."""
    assert loss_of(name, nll_weight=0.3) - loss_of(name) == pytest.approx(0.6, rel=1e-5)
    plain, added = slopes_of(name), slopes_of(name, nll_weight=0.3)
    assert added[0] - plain[0] == pytest.approx(-0.075, rel=1e-4)
    assert added[1] == plain[1]


def test_the_reported_loss_is_free_of_the_nll():
    """`preference_loss` starts at ln 2 whatever nll_weight adds to what training minimises."""
    config = DpoConfig(loss="sigmoid", nll_weight=0.3)
    found = preference_loss(sides(REF), sides(REF), sides(LENGTH), config)
    assert found.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_one_value_a_pair(name):
    """A batch of pairs gives a value each, none of which knows the others."""
    pis = [PI, (-11.0, -15.0), (-10.0, -12.0)]
    pi = tuple(zip(*pis, strict=True))
    found = loss_of(name, pi, ([-10.0] * 3, [-12.0] * 3), ([4.0] * 3, [6.0] * 3), dpop_lambda=5.0)
    assert found == pytest.approx([loss_of(name, one, dpop_lambda=5.0) for one in pis], rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chosen", [-1e5, 1e5])
def test_far_from_the_reference_nothing_overflows(name, chosen):
    """Log ratios of 100,000 nats leave loss and slopes finite."""
    pi = (chosen, -chosen)
    assert math.isfinite(loss_of(name, pi))
    assert all(math.isfinite(slope) for slope in slopes_of(name, pi))


def test_rewards_by_hand():
    """beta (pi - ref): 0.1 x 2 and 0.1 x -3, zero at the reference."""
    assert [r.item() for r in rewards(sides(PI), sides(REF), 0.1)] == pytest.approx([0.2, -0.3])
    assert [r.item() for r in rewards(sides(REF), sides(REF), 0.1)] == [0.0, 0.0]
