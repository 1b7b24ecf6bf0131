"""The command that measures the host's time of an attention call."""

import os
import re
import subprocess
import sys

from support.attention_cases import require_triton
from support.tool_fixtures import ROOT

require_triton()

QUICK = """
from benchmarks import host_time
host_time.ROUNDS, host_time.CALLS = 10, 20
host_time.main()
"""


def test_plain_calls_take_less_of_the_hosts_time_than_operators():
    environment = os.environ | {'TRITON_INTERPRET': '1'}
    done = subprocess.run([sys.executable, '-c', QUICK], cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = re.findall(r'\| ([\w ]+) \| (\d+) \| (\d+) \| ([\d.]+) \|', done.stdout)
    assert [name for name, *_ in rows] == ['inference', 'forward and backward'], done.stderr
    for _, operators, plain, ratio in rows:
        assert 0 < int(plain) < int(operators) and float(ratio) > 1.2  # twice, as a rule
