"""`checkpoint-engine inspect`: what a checkpoint holds, and how it would travel."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from checkpoint_engine.cli.common import Json, Verbose, output, print_json
from checkpoint_engine.cli.summary import size
from checkpoint_engine.errors import SettingError

if TYPE_CHECKING:
    from checkpoint_engine.cli.contents import Contents, Plan

__all__ = ["inspect_checkpoint", "parse_size"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(k|m|g|ki|mi|gi|)b?", re.IGNORECASE)


def inspect_checkpoint(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|METAS",
            help="A directory with *.safetensors, or a JSON file as --save-metas or GET /v1/metas make it.",
            show_default=False,
        ),
    ],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks that share the files of DIR; METAS says itself.", show_default="1"),
    ] = None,
    bucket_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Such as 256MiB or 2GB.", show_default="PS_MAX_BUCKET_SIZE_GB, or 256MiB"),
    ] = None,
    largest: Annotated[int, typer.Option(min=0, help="How many of the largest tensors to list.")] = 5,
    json: Json = False,
    verbose_: Verbose = False,
) -> None:
    """Show what a checkpoint holds, and the plan by which it would be sent. Only headers are read.

    \b
    [dim]# how 8 ranks would share and send it[/]
    checkpoint-engine inspect ./step-100 --ranks 8
    """
    del verbose_
    from checkpoint_engine.cli.contents import read_contents  # noqa: PLC0415 - brings torch

    contents = read_contents(source, ranks, None if bucket_size is None else parse_size(bucket_size), largest)
    if json:
        print_json(contents)
        return
    _show_contents(source, contents)
    _show_plan(contents.plan)


def parse_size(text: str) -> int:
    """Bytes of a size such as `256MiB`, `2GB` or `1000000`.

    Raises:
        SettingError: it is none, or it is zero.
    """
    match = _SIZE.fullmatch(text.strip())
    nbytes = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if nbytes < 1:
        raise SettingError(f"{text!r} is not a size; write 256MiB, 2GB, or a number of bytes")
    return nbytes


def _show_contents(source: Path, contents: "Contents") -> None:
    files = f" in {contents.files} file{'s' if contents.files > 1 else ''}" if contents.files else ""
    output.print(
        f"[bold]{escape(str(source))}[/]: {contents.tensors} tensors, {size(contents.nbytes)}{files}",
        highlight=False,
        soft_wrap=True,
    )
    if contents.left_out:
        output.print(f"left out: {escape(', '.join(contents.left_out))}", highlight=False, soft_wrap=True)
    output.print(f"fingerprint {contents.fingerprint}", style="dim", soft_wrap=True)
    by_dtype = _table("dtype", right=("tensors", "bytes"))
    for share in contents.dtypes:
        by_dtype.add_row(share.dtype, str(share.tensors), size(share.nbytes))
    output.print(by_dtype)
    if contents.largest:
        table = _table("largest tensors", "shape", "dtype", right=("bytes",))
        for tensor in contents.largest:
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            table.add_row(escape(tensor.name), shape, tensor.dtype, size(tensor.nbytes))
        output.print(table)


def _show_plan(plan: "Plan") -> None:
    output.print(
        f"plan: {plan.buckets} buckets of at most {size(plan.bucket_size)}, the largest {size(plan.largest_bucket)}",
        highlight=False,
        soft_wrap=True,
    )
    shares = _table(right=("rank", "tensors", "bytes", "buckets"))
    for rank in plan.ranks:
        shares.add_row(str(rank.rank), str(rank.tensors), size(rank.nbytes), str(rank.buckets))
    output.print(shares)


def _table(*left: str, right: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table
