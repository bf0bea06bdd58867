"""sPAD over all heads, against scipy a head at a time.

Both sides make each head's matrix, in float32, and its two softmaxes, in float64. Then, for
`positions`, scipy gets the places 0, 1, ... twice with the two softmaxes as their weights: it sorts
both lists of places and both together, and looks each place up in both. The places are known to be
sorted and alike, so that sPAD sums the absolute running sum of the difference. For `values`, scipy
gets the two softmaxes as unweighted values, sorts them alone and together and looks each up; sPAD
sorts each, and sums the absolute difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.figures import Figure, alternate, figure
from benchmarks.generated import random_model
from benchmarks.memory import peak_megabytes
from benchmarks.sizes import Shape, Size
from p2d_core.adaptation.slices import TunedSlices
from p2d_core.attention.layout import all_heads, attention_layers, projection_weights, slices_of
from p2d_core.heads.ranking import RankingEvidence
from p2d_core.heads.spad import Spad, head_matrices

RELATIVE = 1e-6
SOME_LAYERS = 3
"""Of the second support, of which scipy takes four times as long a head."""


def measure(size: Size) -> Iterator[Figure]:
    """`ranking_vs_scipy`, for both supports."""
    for shape in size.ranking_shapes:
        # ranking looks at attention alone: the rest of the model may as well be small
        network = random_model(replace(shape, feed_forward=8, vocabulary=8), size)
        layers = attention_layers(network)
        tuned = TunedSlices.from_model(network, slices_of(layers, all_heads(layers)))
        generator = torch.Generator().manual_seed(1)
        for block in tuned.blocks.values():
            noise = torch.randn(block.values.shape, generator=generator) * 1e-3
            block.values.add_(noise.to(block.values.dtype))
        whole = RankingEvidence(network, layers, tuned, ())
        some = min(size.ranked_layers, len(layers))
        evidence = RankingEvidence(network, layers[:some], tuned, ())
        yield _against_scipy(replace(shape, layers=some), evidence, "positions", whole)
        some = min(SOME_LAYERS, size.ranked_layers, len(layers))
        evidence = RankingEvidence(network, layers[:some], tuned, ())
        yield _against_scipy(replace(shape, layers=some), evidence, "values", whole)


def _against_scipy(
    shape: Shape, evidence: RankingEvidence, support: str, whole: RankingEvidence
) -> Figure:
    ours: list[torch.Tensor] = []
    theirs: list[torch.Tensor] = []
    ranker = Spad(support=support)  # type: ignore[arg-type]
    seconds = alternate(
        lambda: ours.append(ranker.rank(evidence)),
        lambda: theirs.append(straight(evidence, support)),
    )
    off = float(((ours[0] - theirs[0]).abs() / theirs[0].abs()).max())
    if not off <= RELATIVE:
        raise AssertionError(f"sPAD and scipy differ by {off:.1e} relative ({support})")
    (of_all,) = alternate(lambda: ranker.rank(whole), runs=3, warm_up=0)
    peaks = [
        peak_megabytes(lambda: ranker.rank(whole)),
        peak_megabytes(lambda: straight(evidence, support, layers=1)),
    ]
    heads = shape.layers * shape.query_heads
    entries = heads * shape.hidden * shape.head_dim
    return figure(
        "ranking_vs_scipy" if support == "positions" else f"ranking_vs_scipy_{support}",
        f"spad ({support}), {heads} heads",
        "softmax and scipy.stats.wasserstein_distance, a head at a time",
        (seconds[0], seconds[1]),
        goal=0.05,
        model=shape.name,
        floor=None,
        floor_of=f"{2 * entries / 1e6:.0f} M exponentials in float64 on both sides",
        note=(
            f"equal to {off:.0e} relative; all {len(whole.layers) * shape.query_heads:,} heads of "
            f"the model in {statistics.median(of_all):.2f} s, "
            f"peak {peaks[0]:.0f} MB against {peaks[1]:.0f} MB beyond the weights"
        ),
    )


def straight(evidence: RankingEvidence, support: str, layers: int | None = None) -> torch.Tensor:
    """The definition: one head, its two distributions, scipy's distance."""
    from scipy.special import softmax
    from scipy.stats import wasserstein_distance

    proxy = evidence.tuned()
    scores = evidence.empty_scores()
    for layer in evidence.layers[:layers]:
        base = projection_weights(evidence.model, layer)
        paths = {"q": layer.q, "k": layer.k, "v": layer.v}
        tuned = {role: proxy.patched(path, base[role]) for role, path in paths.items()}
        per_group = layer.n_query_heads // layer.n_kv_groups
        for group in range(layer.n_kv_groups):
            pair = [
                head_matrices(each["q"], each["k"], each["v"], group, layer.head_dim)
                for each in (base, tuned)
            ]
            for member in range(per_group):
                before, after = (
                    softmax(heads[member].detach().cpu().numpy().astype(np.float64).ravel())
                    for heads in pair
                )
                if support == "positions":
                    places = np.arange(len(before))
                    distance = wasserstein_distance(places, places, before, after)
                else:
                    distance = wasserstein_distance(before, after)
                scores[layer.index, group * per_group + member] = distance
    return scores
