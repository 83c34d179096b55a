"""Each theorem as a picture: the simulation, the printed bound, and what does hold."""

from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from litgpt_memsinks.theory import accumulation as theory_accumulation
from litgpt_memsinks.theory import coadaptation as theory_coadaptation
from litgpt_memsinks.theory import entanglement as theory_entanglement
from litgpt_memsinks.theory import forgetting as theory_forgetting
from litgpt_memsinks.theory.accumulation import Accumulation
from litgpt_memsinks.theory.coadaptation import Coadaptation
from litgpt_memsinks.theory.entanglement import Entanglement
from litgpt_memsinks.theory.forgetting import Forgetting

MEASURED, PRINTED, CORRECTED, OTHER = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # for colour-blind readers
POINTS = 60
"""Points of a line, at most: a picture for the docs stays small"""


def draw_entanglement(figure: Figure) -> None:
    """D.3: the way to the limit, and its distance to disentangled solutions against how new the document is."""
    over_time, over_novelty = _axes(figure)
    runs = {novelty: theory_entanglement.run(Entanglement(novelty=novelty)) for novelty in (0.0, 0.5, 1.0, 1.5, 2.0)}
    for novelty, colour in ((0.5, MEASURED), (0.0, PRINTED)):
        data, flow = runs[novelty]
        shown = _thinned(len(flow.times))
        distances = [theory_entanglement.distance_to_disentangled(flow.weights[step], data) for step in shown]
        over_time.plot(flow.times[shown], distances, color=colour, label=f"new semantic part {novelty:g}")
    over_time.set(yscale="log", title="Gradient flow (D.3)", xlabel="time", ylabel="distance to disentangled solutions")
    over_time.legend()
    ends = [theory_entanglement.distance_to_disentangled(flow.weights[-1], data) for data, flow in runs.values()]
    over_novelty.plot(list(runs), ends, "o", color=MEASURED, label="where gradient flow ends")
    fine = np.linspace(0, 2, POINTS)
    line = [theory_entanglement.corrected_distance(Entanglement().change, float(np.hypot(1, v))) for v in fine]
    over_novelty.plot(fine, line, color=CORRECTED, label="corrected: |Δ| √(1 − 1/|q|²)")
    over_novelty.set(title="Its end: 0 where nothing is new", xlabel="new semantic part", ylabel="the same distance")
    over_novelty.legend()


def draw_coadaptation(figure: Figure) -> None:
    """F.1: the difference that remains after dropping, over steps; and the smallest counterexample."""
    over_steps, over_rate = _axes(figure)
    setup = Coadaptation()
    data, x = theory_coadaptation.stream(setup)
    result, c = theory_coadaptation.train(data, x, setup.learning_rate), theory_coadaptation.least_similarity(data, x)
    length, memory, rate = float(np.linalg.norm(x)), float(np.linalg.norm(result.memory)), setup.learning_rate
    shown = np.arange(1, setup.steps + 1)[:: max(1, setup.steps // POINTS)]
    printed = [theory_coadaptation.printed_bound(int(n), rate, c, length) for n in shown]
    lower = np.array([theory_coadaptation.corrected_bound(int(n), rate, c, length, memory) for n in shown])
    upper = [theory_coadaptation.ceiling(int(n), rate, length, memory) for n in shown]
    over_steps.plot(shown, result.distances[shown], color=MEASURED, label="measured")
    over_steps.plot(shown, printed, "--", color=PRINTED, label="printed lower bound")
    over_steps.plot(shown[lower > 0], lower[lower > 0], color=CORRECTED, label="corrected lower bound")
    over_steps.plot(shown, upper, ":", color=CORRECTED, label="corrected upper bound")
    over_steps.set(title="After dropping (F.1)", xlabel="N", ylabel="distance to the model that never saw it")
    over_steps.legend()
    rates = np.linspace(0.02, 0.98, POINTS)
    one, question = theory_coadaptation.alike(1)
    left = [theory_coadaptation.train(one, question, float(rate)).distances[1] for rate in rates]
    over_rate.plot(rates, left, color=MEASURED, label="measured: γ²")
    bounds = [theory_coadaptation.printed_bound(1, float(rate), 1.0, 1.0) for rate in rates]
    over_rate.plot(rates, bounds, "--", color=PRINTED, label="printed lower bound: γ(1 − γ)")
    over_rate.set(title="All documents 1, N = 1: fails below γ = 1/2", xlabel="γ", ylabel="the same distance")
    over_rate.legend()


def draw_forgetting(figure: Figure) -> None:
    """H.2: the memorised logit over steps on other documents, for similarities of both signs."""
    similar, opposite = _axes(figure)
    setup = Forgetting()
    reverse = replace(setup, least_similarity=-setup.most_similarity, most_similarity=-setup.least_similarity)
    for axes, case in ((similar, setup), (opposite, reverse)):
        logits, C = theory_forgetting.run(case)
        c_min, c_max = theory_forgetting.probability_bounds(C, case.vocabulary)
        start, rate, epsilon = float(logits[0]), case.learning_rate, case.least_similarity
        steps = np.arange(case.steps + 1)
        shown = steps[:: max(1, case.steps // POINTS)]
        printed = [theory_forgetting.printed_bound(start, rate, int(m), epsilon, c_min) for m in shown]
        axes.plot(shown, logits[shown], color=MEASURED, label="measured")
        axes.plot(shown, printed, "--", color=PRINTED, label="printed upper bound")
        if epsilon >= 0:
            bounds = [theory_forgetting.fastest(start, rate, int(m), case.most_similarity, c_max) for m in shown]
            axes.plot(shown, bounds, ":", color=CORRECTED, label="lower bound, by the largest similarity")
        else:
            bounds = [theory_forgetting.corrected_bound(start, rate, int(m), epsilon, c_min, c_max) for m in shown]
            axes.plot(shown, bounds, color=CORRECTED, label="corrected upper bound")
        title = f"Similarities {case.least_similarity:g} to {case.most_similarity:g} (H.2)"
        axes.set(title=title, xlabel="m", ylabel="memorised logit")
        axes.legend()


def draw_accumulation(figure: Figure) -> None:
    """H.3: the memorised logit of shared neurons and of sinks over rho, with all bounds."""
    for axes, share in zip(_axes(figure), (0.5, 0.9), strict=True):
        setups = [Accumulation(active=float(active), shared_share=share) for active in np.linspace(0, 1, 6)]
        results = [theory_accumulation.run(setup) for setup in setups]
        both = list(zip(setups, results, strict=True))
        actives = [setup.active for setup in setups]
        axes.plot(actives, [result.sinks for result in results], "o-", color=MEASURED, label="sinks, measured")
        axes.plot(actives, [result.shared for result in results], "s-", color=OTHER, label="shared, measured")
        printed = [theory_accumulation.printed_sink_bound(setup, result.c_max) for setup, result in both]
        axes.plot(actives, printed, "--", color=PRINTED, label="sinks at least: printed (2)")
        lower = [theory_accumulation.corrected_sink_bound(setup, result.c_max) for setup, result in both]
        axes.plot(actives, lower, color=CORRECTED, label="sinks at least: corrected")
        upper = [theory_accumulation.corrected_shared_bound(setup, result.c_min) for setup, result in both]
        axes.plot(actives, upper, ":", color=CORRECTED, label="shared at most: corrected")
        axes.set(title=f"|z_shared|² = {share:g} (H.3)", xlabel="ρ", ylabel="memorised logit at the end")
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 0.1))


def _axes(figure: Figure) -> tuple[Axes, Axes]:
    """Two pictures side by side."""
    left, right = figure.subplots(1, 2)
    return left, right


def _thinned(count: int) -> list[int]:
    """At most ``POINTS`` indices below ``count``, the first and the last included."""
    return [int(index) for index in np.unique(np.linspace(0, count - 1, POINTS).round())]
