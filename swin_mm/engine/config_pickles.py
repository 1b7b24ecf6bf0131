"""Reject configs that would make mmengine, mmdet or mmseg open a pickle or YAML file, because that can run code.

mmengine reads YAML with a loader that constructs any Python object.
"""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from swin_mm.utils.errors import InputError

# Keys of checkpoints, which are read without running code, and of files that are written.
_NOT_OPENED = ('checkpoint', 'pretrained', 'teacher_ckpt', 'out_file_path', 'proposals_file', 'output_dir')


def require_no_pickles(cfg: Config, *parts: str) -> None:
    """Raise if a config names a pickle or YAML file to be opened, such as ``proposal_file='x.pkl'``.

    Args:
        cfg: the config.
        parts: what will run, of 'train', 'val' and 'test' (their dataloaders and evaluators), and 'model'.

    Raises:
        InputError: such a file would be opened; the message names each file and its key.
    """
    sections = [f'{part}_{kind}' for part in parts if part != 'model' for kind in ('dataloader', 'evaluator')]
    sections += ['model'] * ('model' in parts)
    opened = (item for section in sections for item in find_code_files(cfg.get(section), section))
    found = {value: key for key, value in opened if not set(key.split('.')) & set(_NOT_OPENED)}
    if found:
        listed = ', '.join(f'{value} ({key})' for value, key in found.items())
        raise InputError(
            f'the config opens pickles or YAML files, which can run any code: {listed}; convert them to JSON or NumPy '
            'files, or pass --allow-pickle if you trust where they come from'
        )


def find_code_files(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Find every setting that makes a loader of mmengine, mmdet or mmseg open a pickle or YAML file.

    Args:
        node: a config, or a part of one.
        path: its dotted key.

    Yields:
        (dotted key, value) of each setting.
    """
    if isinstance(node, dict):
        if 'OccludedSeparated' in str(node.get('type')):  # its defaults are pickles to download
            yield f'{path}.type', str(node['type'])
        for key, value in node.items():
            yield from find_code_files(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from find_code_files(value, f'{path}.{index}')
    elif isinstance(node, str):
        # mmengine's file handlers go by the suffix, or by a setting such as file_format='pkl'; mmseg's reader of
        # medical images by decode_backend='pickle'.
        text = node.lower()
        is_format = path.endswith(('.file_format', '.decode_backend')) and text in ('pkl', 'pickle', 'yaml', 'yml')
        is_yaml = path.endswith('_file') and text.endswith(('.yaml', '.yml'))
        if is_format or is_yaml or text.endswith(('.pkl', '.pickle')):
            yield path, node
