"""The table of docs/plug.md: strides and multiply-adds of stock configs before and after plugging.

    cd tests && python -m support.plug_table ../docs/plug.md            # print the rows of the file, measured again
    cd tests && python -m support.plug_table ../docs/plug.md --write    # and write them into the file

Takes about ten minutes on one CPU core; needs neither weights nor data.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swin_mm.analysis import complexity
from swin_mm.openmmlab.config import load_config
from swin_mm.openmmlab.plug import Report, plug_with_report
from swin_mm.ops.attention import reference
from swin_mm.utils.errors import InputError

SIZE = 512  # side of the image that multiply-adds are counted for
ROW = re.compile(r'^\| (?P<method>\S+) \| `(?P<config>\w+::\S+)` \| .+ \|$', re.MULTILINE)


class Row(NamedTuple):
    """One stock config: what its heads read, and its multiply-adds, before and after."""

    method: str
    config: str
    strides: str
    gmac: str
    notes: str

    def markdown(self) -> str:
        """Return the row as it stands in the table."""
        return f'| {self.method} | `{self.config}` | {self.strides} | {self.gmac} | {self.notes} |'


def measure(method: str, name: str) -> Row:
    """Plug a stock config with Swin-T and measure it."""
    before = load_config(name)
    try:
        after, report = plug_with_report(before, 't')
    except InputError as error:
        reason = str(error).removeprefix('cannot be plugged: ')
        return Row(method, name, '-', '-', f'refused: {reason}')
    gmac = count_both(before, after)
    return Row(method, name, read_by_heads(report), gmac, '; '.join(short_notes(report)) or '-')


def count_both(before: Config, after: Config) -> str:
    """Return the 10^9 multiply-adds of predicting on one image, without the heads where they need annotations."""
    side = before.model.backbone.get('img_size', SIZE)
    side = side if isinstance(side, int) else side[0]  # some transformers accept only one image size
    mark = '' if side == SIZE else f' ({side})'
    try:
        figures = [count(cfg, side) for cfg in (before, after)]
    except Exception:
        figures, mark = [count_without_heads(cfg, side) for cfg in (before, after)], f'{mark} *'
    return f'{figures[0] / 1e9:.1f} → {figures[1] / 1e9:.1f}{mark}'


def count(cfg: Config, side: int) -> int:
    """Return the multiply-adds of the whole model, on the CPU where it cannot be built on the meta device."""
    try:
        return sum(complexity.multiply_adds(cfg, side, side).values())
    except Exception:
        return _count_on_cpu(cfg, side, complexity.run)


def count_without_heads(cfg: Config, side: int) -> int:
    """Return the multiply-adds of backbone and neck."""
    return _count_on_cpu(cfg, side, lambda model, image: model.extract_feat(image))


def _count_on_cpu(cfg: Config, side: int, run: Callable[[Any, Tensor], object]) -> int:
    model = complexity.build(cfg, 'cpu')
    complexity.set_attention(model, reference.attention)  # the counter does not know our operators
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(model, torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2


def read_by_heads(report: Report) -> str:
    """Return the strides of the maps that the (first) head reads; detectors' heads read all maps of the neck."""
    parts = {part.part: part for part in report.strides}
    part = next(parts[name] for name in ('decode_head', 'decode_head.0', 'neck', 'backbone') if name in parts)
    before, after = (' '.join(f'{stride:g}' for stride in side) for side in part[1:])
    return before if before == after else f'{before} → {after}'


def short_notes(report: Report) -> list[str]:
    """Return the notes that the other columns do not show."""
    found = []
    for note in report.notes:
        found += [f'`{change}`' for change in re.findall(r'; (\w+ \(.+?\) became \(.+?\))', note)]
        if match := re.match(r'neck \((\w+)\) removed', note):
            found.append(f'{match[1]} removed')
        if match := re.search(r'out_indices is (\(.+?\));', note):
            found.append(f'`out_indices={match[1]}`')
        if match := re.search(r'removed (bias_lr_mult)|that the new model does not have: (.+)', note):
            found.append(f'`{match[1] or match[2]}` removed')
        if 'cannot be run here' in note:
            found.append('strides not compared')
    return found


def main() -> None:
    """Measure the rows of a page again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('page', type=Path)
    parser.add_argument('--only', default='', metavar='TEXT', help='rows whose config contains this')
    parser.add_argument('--write', action='store_true', help='replace the rows in the page')
    args = parser.parse_args()
    text = args.page.read_text()
    for match in ROW.finditer(text):
        if args.only not in match['config']:
            continue
        row = measure(match['method'], match['config']).markdown()
        print(row, flush=True)
        text = text.replace(match[0], row)
    if args.write:
        args.page.write_text(text)


if __name__ == '__main__':
    main()
