"""Every address in configs, metafiles and pages has the form of one that exists. Nothing is fetched."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from swin_mm.checkpoints.files import MOVED_HOSTS, current_address, promised_hash

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for pattern in (
        *('*.md', '*.yml', '*.cff', '*.toml', 'Dockerfile'),
        *('docs/**/*.md', 'configs/**/*.md', 'configs/**/*.yml', 'configs/**/*.py', 'data/*/*.md', 'tools/*'),
    )
    for path in ROOT.glob(pattern)
    if path.is_file()
)
# Weights, by host: the official ones carry no hash, those of OpenMMLab the beginning of their SHA-256.
WEIGHTS = {
    'github.com': r'/SwinTransformer/storage/releases/download/(v1\.0\.\d|v2\.0\.0)/'
    r'swin(v2)?_(tiny|small|base|large)_patch4_window\d+(to\d+)?_\d+(to\d+)?(_22k|_22kto1k_ft)?\.pth',
    'mmassets.onedl.ai': r'/mm(detection|segmentation|pretrain)/v\d\.\d/\w+/(?P<run>[\w.-]+)/'
    r'(?P=run)_20\d{6}_\d{6}-(?P<hash>[0-9a-f]{8})\.pth',
}
# Other pages: hosts, and those among them that may be named without https.
HOSTS = {
    *('arxiv.org', 'bbbc.broadinstitute.org', 'cocodataset.org', 'creativecommons.org', 'doi.org', 'github.com'),
    *(
        'huggingface.co',
        'keepachangelog.com',
        'semver.org',
        'pypi.org',
        'pytorch.org',
        'download.pytorch.org',
        'mmwheels.onedl.ai',
    ),
    *('localhost', 'sceneparsing.csail.mit.edu'),
}
NO_HTTPS = {'localhost', 'sceneparsing.csail.mit.edu'}


def addresses(path: Path) -> Iterator[str]:
    for address in re.findall(r'\bhttps?://[^\s\'"`<>()\[\]{}|\\]+', path.read_text()):
        yield address.rstrip('.,;:')


def problem(address: str) -> str:
    """What is wrong with the form of an address; empty if nothing is."""
    parts = urlsplit(address)
    host = parts.hostname or ''
    if host in MOVED_HOSTS:
        return 'the host is gone'
    if parts.scheme != 'https' and host not in NO_HTTPS:
        return 'not https'
    if parts.path.endswith(('.pth', '.pt', '.pkl', '.bin', '.safetensors')):
        found = re.fullmatch(WEIGHTS.get(host, '(?!)'), parts.path)
        if not found:
            return 'not a known form of weights'
        named = found.groupdict().get('hash')
        return '' if promised_hash(Path(parts.path).name) == named else 'the hash in the name is not recognised'
    return '' if host in HOSTS else 'not a known host'


def test_addresses_in_the_repository():
    wrong, seen = [], set()
    for path in FILES:
        for address in addresses(path):
            seen.add(urlsplit(address).hostname)
            if text := problem(address):
                wrong.append(f'{path.relative_to(ROOT)}: {address}: {text}')
    assert not wrong, '\n'.join(wrong)
    assert {'github.com', 'mmassets.onedl.ai', 'arxiv.org'} <= seen
    assert any(path.name == 'metafile.yml' for path in FILES)


def test_metafiles_name_pages_and_weights_alone():
    """Read as mim reads them, so that nothing hides in another notation."""
    for path in (ROOT / 'configs').glob('*/metafile.yml'):
        nodes = [yaml.safe_load(path.read_text())]
        while nodes:
            node = nodes.pop()
            nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
            assert not (isinstance(node, str) and '://' in node and problem(node)), f'{path}: {node}'


@pytest.mark.parametrize(
    'address, expected',
    [
        ('https://download.openmmlab.com/mmdetection/v2.0/swin/a/a_20210906_131725-bacf6f7b.pth', 'host is gone'),
        ('http://arxiv.org/abs/2103.14030', 'not https'),
        ('https://openmmlab.example.org/', 'not a known host'),
        ('https://example.org/swin.pth', 'not a known form'),
        ('https://mmassets.onedl.ai/mmdetection/v2.0/swin/a/b_20210906_131725-bacf6f7b.pth', 'not a known form'),
        ('https://mmassets.onedl.ai/mmdetection/v2.0/swin/a/a_20210906_131725.pth', 'not a known form'),
        ('https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny.pth', 'not a known form'),
        ('https://mmassets.onedl.ai/mmdetection/v2.0/swin/a/a_20210906_131725-bacf6f7b.pth', ''),
    ],
)
def test_wrong_addresses_are_found(address, expected):
    assert (expected in problem(address)) if expected else not problem(address)


def test_the_new_hosts_are_known_and_alive():
    assert not set(MOVED_HOSTS.values()) & set(MOVED_HOSTS)
    assert set(MOVED_HOSTS.values()) <= set(WEIGHTS)
    for old in MOVED_HOSTS:
        assert not problem(current_address(f'https://{old}/mmsegmentation/v0.5/swin/a/a_20210531_112542-e380ad3e.pth'))
