"""The task families that come with the package.

None needs a download. Optimization limits all of their tasks, and not data: what they share
(:mod:`amalgam.tasks.family_data`) is large, and what they draw beside is computed from it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.tasks import family_data
from amalgam.tasks.family import (
    Design,
    Draws,
    NetworkFamily,
    between,
    random_network,
    some_of,
)
from amalgam.tasks.networks import (
    ACTIVATIONS,
    GRU,
    POOLINGS,
    Attention,
    Factors,
    Residual,
    convolutions,
    mlp,
)
from amalgam.tasks.task import Batch

_IMAGES = {"digits": family_data.images, "halves": family_data.halved_images}

# Between the smallest and the largest standard deviation of targets' noise.
_NOISE = (0.01, 0.3)


@dataclass(frozen=True, kw_only=True)
class _ActivatedFamily(NetworkFamily):
    """A family of networks with activations, and with norms before them or without.

    Attributes:
        activations: Some of ``"relu"``, ``"tanh"``, ``"sigmoid"``, ``"gelu"``, ``"elu"``.
        norms: ``"none"``, ``"norm"`` or both.
    """

    activations: tuple[str, ...] = some_of(*ACTIVATIONS)
    norms: tuple[str, ...] = some_of("none", "norm")


@dataclass(frozen=True, kw_only=True)
class MLPs(_ActivatedFamily):
    """Classification by MLPs; the norm is layer norm.

    Attributes:
        depth: Hidden layers.
        data: Images of digits (``"digits"``, 8 x 8; ``"halves"``, 4 x 4; ten classes), or features
            whose class a random network decides (``"synthetic"``).
        features: Of synthetic data.
        classes: Of synthetic data.
    """

    depth: tuple[int, int] = between(1, 4)
    data: tuple[str, ...] = some_of("digits", "halves", "synthetic")
    features: tuple[int, int] = between(4, 24, most=family_data.FEATURES)
    classes: tuple[int, int] = between(2, 10, least=2)

    @property
    def name(self) -> str:
        """See :class:`amalgam.tasks.TaskFamily`."""
        return "families.mlp"

    def shared(self) -> Sequence[str]:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        return [{"synthetic": "features"}.get(one, one) for one in self.data]

    def design(self, draws: Draws) -> Design:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        depth, activation = draws.integer(self.depth), draws.choice(self.activations)
        norm, data = draws.choice(self.norms), draws.choice(self.data)
        if data == "synthetic":
            inputs, classes = draws.integer(self.features), draws.integer(self.classes)
            train, validation = _synthetic(draws, inputs, classes)
        else:
            x, y, held_out, labels = _IMAGES[data]()
            train, validation = (x, y), (held_out, labels)
            inputs, classes = x.shape[1], 10

        return Design(
            lambda width: mlp(
                [inputs, *[width] * depth, classes], activation, normed=norm != "none"
            ),
            train,
            validation,
            functional.cross_entropy,
            f"{data}, depth {depth}, {activation}, {norm}",
            2 if norm == "none" else 4,
        )


@dataclass(frozen=True, kw_only=True)
class Convolutions(_ActivatedFamily):
    """Classification of digits by convolutional networks; the norm is group norm, of one group.

    Attributes:
        depth: Convolutions.
        poolings: ``"max"``, ``"average"`` or both.
    """

    depth: tuple[int, int] = between(1, 3)
    poolings: tuple[str, ...] = some_of(*POOLINGS)

    @property
    def name(self) -> str:
        """See :class:`amalgam.tasks.TaskFamily`."""
        return "families.convolution"

    def shared(self) -> Sequence[str]:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        return ["digits"]

    def design(self, draws: Draws) -> Design:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        depth, activation = draws.integer(self.depth), draws.choice(self.activations)
        norm, pooling = draws.choice(self.norms), draws.choice(self.poolings)
        x, y, held_out, labels = family_data.images()
        return Design(
            lambda width: convolutions(
                width, depth, activation, pooling=pooling, normed=norm != "none"
            ),
            (x, y),
            (held_out, labels),
            functional.cross_entropy,
            f"depth {depth}, {activation}, {norm}, {pooling}",
        )


@dataclass(frozen=True, kw_only=True)
class Residuals(_ActivatedFamily):
    """Classification of digits by residual networks; the norm is group norm, of one group.

    Attributes:
        blocks: Residual blocks, of two convolutions each.
    """

    blocks: tuple[int, int] = between(1, 3)

    @property
    def name(self) -> str:
        """See :class:`amalgam.tasks.TaskFamily`."""
        return "families.residual"

    def shared(self) -> Sequence[str]:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        return ["digits"]

    def design(self, draws: Draws) -> Design:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        blocks, activation = draws.integer(self.blocks), draws.choice(self.activations)
        norm = draws.choice(self.norms)
        x, y, held_out, labels = family_data.images()
        return Design(
            lambda width: Residual(width, blocks, activation, normed=norm != "none"),
            (x, y),
            (held_out, labels),
            functional.cross_entropy,
            f"blocks {blocks}, {activation}, {norm}",
        )


@dataclass(frozen=True, kw_only=True)
class Autoencoders(_ActivatedFamily):
    """Autoencoders of digits by the mean squared error; the norm is layer norm.

    Attributes:
        depth: Hidden layers on either side of the bottleneck, which has half their width.
        data: ``"digits"`` (8 x 8 pixels), ``"halves"`` (4 x 4), or both.
    """

    depth: tuple[int, int] = between(1, 2)
    data: tuple[str, ...] = some_of("digits", "halves")

    @property
    def name(self) -> str:
        """See :class:`amalgam.tasks.TaskFamily`."""
        return "families.autoencoder"

    def shared(self) -> Sequence[str]:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        return self.data

    def design(self, draws: Draws) -> Design:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        depth, activation = draws.integer(self.depth), draws.choice(self.activations)
        norm, data = draws.choice(self.norms), draws.choice(self.data)
        x, _, held_out, _ = _IMAGES[data]()

        def widths(width: int) -> list[int]:
            side = [width] * depth
            return [x.shape[1], *side, width // 2, *side, x.shape[1]]

        return Design(
            lambda width: mlp(widths(width), activation, normed=norm != "none"),
            (x, x),
            (held_out, held_out),
            functional.mse_loss,
            f"{data}, depth {depth}, {activation}, {norm}",
            4 if norm == "none" else 8,
        )


@dataclass(frozen=True, kw_only=True)
class Regressions(_ActivatedFamily):
    """Regression of a random network's noisy outputs by MLPs; the norm is layer norm.

    Attributes:
        depth: Hidden layers.
        features: Of the inputs.
        outputs: Of both networks.
    """

    depth: tuple[int, int] = between(1, 4)
    features: tuple[int, int] = between(4, 24, most=family_data.FEATURES)
    outputs: tuple[int, int] = between(1, 4)

    @property
    def name(self) -> str:
        """See :class:`amalgam.tasks.TaskFamily`."""
        return "families.regression"

    def shared(self) -> Sequence[str]:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        return ["features"]

    def design(self, draws: Draws) -> Design:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        depth, activation = draws.integer(self.depth), draws.choice(self.activations)
        norm, inputs = draws.choice(self.norms), draws.integer(self.features)
        outputs = draws.integer(self.outputs)
        x = family_data.features()[:, :inputs]
        train, validation = _split(x, _noisy(draws, random_network(draws, inputs, outputs)(x)))
        return Design(
            lambda width: mlp(
                [inputs, *[width] * depth, outputs], activation, normed=norm != "none"
            ),
            train,
            validation,
            functional.mse_loss,
            f"{inputs} to {outputs}, depth {depth}, {activation}, {norm}",
            2 if norm == "none" else 4,
        )


@dataclass(frozen=True, kw_only=True)
class _CharacterModels(NetworkFamily):
    """A family of models that predict each next character.

    Attributes:
        corpora: ``"sources"``, of Python's standard library, ``"help"``, which ``pydoc`` shows, or
            both.
        symbols: Numbers of symbols, one of which a draw takes.
        context: Characters that a sample has.
    """

    corpora: tuple[str, ...] = some_of("sources", "help")
    symbols: tuple[int, ...] = some_of(16, 32, 64)
    context: tuple[int, int] = between(6, 16)

    def shared(self) -> Sequence[str]:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        return self.corpora

    def text(self, draws: Draws) -> tuple[str, int, int, Batch, Batch]:
        """Corpus, symbols, context, and pieces of text with what follows each character."""
        corpus, symbols = draws.choice(self.corpora), draws.choice(self.symbols)
        context = draws.integer(self.context)
        train, held_out = family_data.pieces(family_data.text(corpus, symbols), context + 1)
        return (
            *(corpus, symbols, context),
            (train[:, :-1], train[:, 1:]),
            (held_out[:, :-1], held_out[:, 1:]),
        )


@dataclass(frozen=True, kw_only=True)
class Attentions(_CharacterModels, _ActivatedFamily):
    """Character models of causal attention and MLPs; the norm is layer norm.

    Attributes:
        blocks: Blocks of attention and an MLP.
        heads: Numbers of attention heads, one of which a draw takes.
    """

    blocks: tuple[int, int] = between(1, 2)
    heads: tuple[int, ...] = some_of(1, 2)

    @property
    def name(self) -> str:
        """See :class:`amalgam.tasks.TaskFamily`."""
        return "families.attention"

    def design(self, draws: Draws) -> Design:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        corpus, symbols, context, train, validation = self.text(draws)
        blocks, heads = draws.integer(self.blocks), draws.choice(self.heads)
        activation, norm = draws.choice(self.activations), draws.choice(self.norms)
        return Design(
            # Numbers in a head, so that heads always divide the stream.
            lambda width: Attention(
                width * heads,
                blocks,
                heads,
                symbols=symbols,
                context=context,
                activation=activation,
                normed=norm != "none",
            ),
            train,
            validation,
            functional.cross_entropy,
            f"{corpus}, {symbols} symbols, context {context}, blocks {blocks}, heads {heads}, "
            f"{activation}, {norm}",
            2 if norm == "none" else 4 // heads,
        )


@dataclass(frozen=True, kw_only=True)
class GRUs(_CharacterModels):
    """Character models of gated recurrent units.

    Attributes:
        context: Characters that a sample has.
        layers: Recurrent layers.
    """

    context: tuple[int, int] = between(4, 10)
    layers: tuple[int, int] = between(1, 2)

    @property
    def name(self) -> str:
        """See :class:`amalgam.tasks.TaskFamily`."""
        return "families.gru"

    def design(self, draws: Draws) -> Design:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        corpus, symbols, context, train, validation = self.text(draws)
        layers = draws.integer(self.layers)
        return Design(
            lambda width: GRU(width, layers, symbols=symbols),
            train,
            validation,
            functional.cross_entropy,
            f"{corpus}, {symbols} symbols, context {context}, layers {layers}",
        )


@dataclass(frozen=True, kw_only=True)
class Factorisations(NetworkFamily):
    """Factorisations of random matrices, each seen through noisy values of its bilinear form.

    The matrix has singular values that fall from 1 to ``1 / condition``, evenly in their logs.

    Attributes:
        rows: Of the matrix.
        columns: Of the matrix.
        rank: Of the matrix. That of its factors is the width, which the parameters decide.
        factors: How many factors it is a product of.
        condition: The ratio of the matrix's largest to its smallest singular value.
    """

    rows: tuple[int, int] = between(8, 24, most=family_data.FEATURES // 2)
    columns: tuple[int, int] = between(8, 24, most=family_data.FEATURES // 2)
    rank: tuple[int, int] = between(1, 8)
    factors: tuple[int, int] = between(2, 3, least=2)
    condition: tuple[float, float] = between(1.0, 30.0)

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        super().__post_init__()
        if self.rank[1] > min(self.rows[0], self.columns[0]):
            raise ValueError(
                f"rank must be at most {min(self.rows[0], self.columns[0])}, the smallest number "
                f"of rows or columns, not {list(self.rank)}"
            )

    @property
    def name(self) -> str:
        """See :class:`amalgam.tasks.TaskFamily`."""
        return "families.factorisation"

    def shared(self) -> Sequence[str]:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        return ["features"]

    def design(self, draws: Draws) -> Design:
        """See :class:`amalgam.tasks.family.NetworkFamily`."""
        rows, columns = draws.integer(self.rows), draws.integer(self.columns)
        rank, factors = draws.integer(self.rank), draws.integer(self.factors)
        condition = draws.log_uniform(self.condition)
        left, right = (
            torch.linalg.qr(torch.randn((size, rank), generator=draws.generator))[0]
            for size in (rows, columns)
        )
        values = condition ** -torch.linspace(0, 1, rank) if rank > 1 else torch.ones(1)
        features = family_data.features()
        x, z = features[:, :rows], features[:, -columns:]
        # The form of independent normal features has the variance sum(values^2).
        clean = ((x @ (left * values)) * (z @ right)).sum(1) / values.norm()
        y = _noisy(draws, clean)
        count = family_data.SAMPLES
        return Design(
            functools.partial(Factors, rows=rows, columns=columns, factors=factors),
            (x[:count], z[:count], y[:count]),
            (x[count:], z[count:], y[count:]),
            functional.mse_loss,
            f"{rows} x {columns} of rank {rank}, condition {condition:.3g}, factors {factors}",
        )


def _synthetic(draws: Draws, inputs: int, classes: int) -> tuple[Batch, Batch]:
    """Features, and the class that a random network gives them."""
    x = family_data.features()[:, :inputs]
    return _split(x, random_network(draws, inputs, classes)(x).argmax(1))


def _noisy(draws: Draws, y: Tensor) -> Tensor:
    """The values with normal noise, of a standard deviation that is drawn."""
    deviation = draws.log_uniform(_NOISE)
    return y + deviation * torch.randn(y.shape, generator=draws.generator)


def _split(x: Tensor, y: Tensor) -> tuple[Batch, Batch]:
    count = family_data.SAMPLES
    return (x[:count], y[:count]), (x[count:], y[count:])


FAMILIES: dict[str, type[NetworkFamily]] = {
    "families.mlp": MLPs,
    "families.convolution": Convolutions,
    "families.residual": Residuals,
    "families.autoencoder": Autoencoders,
    "families.regression": Regressions,
    "families.attention": Attentions,
    "families.gru": GRUs,
    "families.factorisation": Factorisations,
}
"""The families by their names in recipes."""
