"""``orbq embed``: how elements lie in the latent space of networks, and whether by chemistry."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orbq.errors import InputError
from orbq.output import Whole, output

if TYPE_CHECKING:
    import numpy as np

    from orbq.embed import Atoms, Elements
    from orbq.embed_files import Space
    from orbq.preprocess.store import Dataset
    from orbq.run import Run

INTERRUPTED = "Run the same command again."
CHEMISCOPE = "chemiscope.json.gz"
WRITTEN = (
    *("pca.png", "tsne.png", "clustering.csv", "elements.csv", "embeddings.npz"),
    CHEMISCOPE,
)
SPLITS = "all|train|validation|test"


def embed(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN... DATASET", help="Runs, then one data set.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for pictures, tables and features.")
    ] = Path("embedding"),
    elements: Annotated[
        str | None,
        typer.Option(
            help="Symbols, four or more, e.g. Ti,Zr,V,Nb (default: all metals of the data set)."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(metavar=SPLITS, help="Which structures; parts of a run's own data only.")
    ] = "all",
    permutations: Annotated[
        int, typer.Option(min=19, help="Random exchanges of the labels behind each p-value.")
    ] = 999,
    chemiscope: Annotated[
        bool, typer.Option(help="Write a file to explore on chemiscope.org.")
    ] = True,
    batch_size: Annotated[
        float, typer.Option(min=1, help="Structures per batch, on average.")
    ] = 16,
) -> None:
    """Map the elements in the latent space of one or several networks; test whether they cluster.

    Takes every atom's scalars after the last layer, averages them per element, and writes pca.png
    and tsne.png (coloured by group, row and d electrons; several runs side by side),
    clustering.csv (silhouette and nearest-neighbour purity by group and by row, with permutation
    p-values, and the same network's before training), elements.csv, embeddings.npz and
    chemiscope.json.gz. Needs pip install 'orbq[explore]'.

    Whether elements cluster by themselves is a question to runs of model.species = "free": with
    "shells" the network is told each element's valence shells beforehand.

    \b
    Examples:
      orbq embed runs/multitask tmc
      orbq embed runs/energy-only runs/multitask datasets/mine --out latent
      orbq embed runs/multitask tmc --elements Ti,Zr,Hf,V,Nb,Ta,Cr,Mo,W,Mn,Tc,Re
    """
    import numpy as np

    from orbq.datasets import open_dataset
    from orbq.elements import METALS
    from orbq.embed import choose_atoms, elements_of
    from orbq.embed_files import require
    from orbq.evaluate import split_rows
    from orbq.inference import open_run
    from orbq.preprocess.links import make_directory, refuse_links
    from orbq.run_files import names_of

    if len(runs) < 2:
        raise InputError("name at least one run and then the data set: orbq embed RUN... DATASET")
    *directories, name = runs
    for module in ["sklearn"] + ["chemiscope"] * chemiscope:
        require(module)
    wanted = _parsed(elements) if elements else METALS
    refuse_links(out, "--out", WRITTEN)
    loaded = {n: open_run(d) for n, d in zip(names_of(directories), directories, strict=True)}
    data = open_dataset(name)
    parts = [split_rows(run, data, split)[1] for run in loaded.values()]
    rows = reduce(np.intersect1d, parts)
    if not len(rows):
        raise InputError(f"no structure of {name} is in the {split} split of every run")
    told = []
    if any(len(part) > len(rows) for part in parts):
        told.append(f"The runs divide {name} differently: what is {split} in each is taken")
    known = set.intersection(*(set(run.elements) for run in loaded.values()))
    atoms = choose_atoms(data, rows, wanted, sorted(known))
    found = elements_of(atoms, data.method)
    told.append(
        f"{len(atoms.numbers):,} atoms of {len(found.numbers)} elements in {len(atoms.rows):,} of "
        f"{len(rows):,} structures: {', '.join(found.symbols)}"
    )
    make_directory(out, "--out")
    spaces: dict[str, Space] = {}
    for run_name, run in loaded.items():
        first = next(iter(spaces.values()), None)
        with _bar(run_name) as bar:
            spaces[run_name] = _space(
                run, data, atoms, found, (batch_size, permutations), first, bar
            )
    written = _write(spaces, data, atoms, found, out, chemiscope)
    console = output()  # when all is written: who reads may have enough
    console.print("\n".join(told))
    _show(spaces, permutations, console)
    console.print("\n".join(written))


def _parsed(text: str) -> tuple[int, ...]:
    from orbq.orbitals import SYMBOLS

    symbols = [s.strip() for s in text.split(",") if s.strip()]
    if unknown := [s for s in symbols if s not in SYMBOLS[1:]]:
        raise InputError(
            f"--elements {text}: {unknown[0]!r} is no element of Z = 1..86; write it as Fe,Co,Ni"
        )
    return tuple(sorted({SYMBOLS.index(s) for s in symbols}))


def _bar(name: str) -> Any:
    progress = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    progress.add_task(name, total=None)
    return progress


def _space(
    run: Run,
    data: Dataset,
    atoms: Atoms,
    elements: Elements,
    settings: tuple[float, int],
    first: Space | None,
    bar: Progress,
) -> Space:
    """Features, maps and statistics of one run. settings: batch size and permutations."""
    from orbq import embed
    from orbq.embed_files import Space

    batch_size, permutations = settings

    def told(done: int, total: int) -> None:
        bar.update(bar.task_ids[0], completed=done, total=total)

    features = embed.features_of(run, data, atoms, batch_size, progress=told)
    before = embed.features_of(run, data, atoms, batch_size, embed.untrained(run), told)
    scaled, scaled_before = embed.standardised(features), embed.standardised(before)
    means = embed.means_of(scaled, atoms.numbers)
    means_before = embed.means_of(scaled_before, atoms.numbers)
    pca, points = embed.principal(means, scaled)
    statistics, differences = {}, {}
    for label in embed.LABELS:
        labels = elements.labels(label)
        own = embed.clustering(means, labels, permutations)
        other = embed.clustering(means_before, labels, permutations)
        for name in own:
            statistics[label, name] = (own[name], other[name])
            if first is not None:
                base = first.statistics[label, name][0]
                differences[label, name] = embed.difference(base, own[name], permutations)
    return Space(
        species=run.potential.architecture.species,
        features=features,
        means=means,
        maps={"PCA": pca, "t-SNE": embed.tsne(means)},
        atoms=points,
        statistics=statistics,
        differences=differences,
    )


def _show(spaces: dict[str, Space], permutations: int, console: Console) -> None:
    """The statistics as a table, and what they can and cannot say."""
    import numpy as np

    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("run", "species", "by", "statistic"):
        table.add_column(column)
    several = len(spaces) > 1
    for column in ["value", "chance", "p", "untrained"] + ["difference", "p"] * several:
        table.add_column(column, justify="right")
    for name, space in spaces.items():
        for (label, statistic), (own, before) in space.statistics.items():
            numbers = [f"{x:.2f}" for x in (own.value, own.chance)]
            more = space.differences.get((label, statistic))
            cells = [*numbers, f"{own.p:.3f}", f"{before.value:.2f}"]
            cells += [f"{more[0]:+.2f}", f"{more[1]:.3f}"] if more else []
            table.add_row(name, space.species, label, statistic, *cells)
    console.print(Whole(table))
    console.print(
        f"chance: mean of {permutations} random exchanges of the labels; p: share of them that "
        "reach the value.\nuntrained: the same network before training, which tells elements apart "
        "by the surroundings\nthey have in these data alone: only what exceeds it was learnt."
    )
    undefined = dict.fromkeys(
        label
        for space in spaces.values()
        for (label, _), (own, _) in space.statistics.items()
        if np.isnan(own.value)
    )
    if undefined:
        text = (
            f"no statistic by {', '.join(undefined)}: all these elements have one, or each has its "
            "own; name others with --elements"
        )
        console.print(Text(text, "yellow"))
    if several:
        first = next(iter(spaces))
        console.print(
            f"difference: to {first}; its p by exchanging the networks, element by element."
        )
    if told := [name for name, space in spaces.items() if space.species == "shells"]:
        console.print(
            Text(
                f'{", ".join(told)}: model.species = "shells" tells the network each element\'s '
                "valence shells and row, so that clustering is in part put in (see the column "
                '"untrained"). Whether elements cluster by themselves needs runs with '
                'model.species = "free".',
                "yellow",
            )
        )


def _write(
    spaces: dict[str, Space],
    data: Dataset,
    atoms: Atoms,
    elements: Elements,
    out: Path,
    chemiscope: bool,
) -> list[str]:
    """Write pictures, tables and features; tells which."""
    from orbq.embed_files import (
        write_chemiscope,
        write_elements,
        write_features,
        write_statistics,
    )
    from orbq.embed_plots import map_figure

    written = [
        write_statistics(spaces, out / "clustering.csv"),
        write_elements(spaces, elements, out / "elements.csv"),
        write_features(spaces, atoms, elements, out / "embeddings.npz"),
    ]
    behind: dict[str, np.ndarray] = {name: space.atoms for name, space in spaces.items()}
    for kind, file in {"PCA": "pca.png", "t-SNE": "tsne.png"}.items():
        maps = {name: space.maps[kind] for name, space in spaces.items()}
        map_figure(maps, elements, kind, out / file, behind if kind == "PCA" else None)
        written.append(out / file)
    told = []
    (out / CHEMISCOPE).unlink(missing_ok=True)  # of an earlier command
    if chemiscope:
        path, n = write_chemiscope(spaces, data, atoms, elements, out / CHEMISCOPE)
        written.append(path)
        if n < len(atoms.numbers):
            told.append(f"{path.name} holds {n:,} of {len(atoms.numbers):,} atoms")
    return [*told, f"wrote to {out}: " + ", ".join(p.name for p in written)]
