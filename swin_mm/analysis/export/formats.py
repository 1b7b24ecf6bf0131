"""Writing a module in each format, and loading the file again to run it."""

import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from swin_mm.analysis.export.comparison import Run
from swin_mm.analysis.export.metadata import KEY, Metadata
from swin_mm.analysis.export.operators import onnx_translations
from swin_mm.analysis.export.whole import Exportable
from swin_mm.utils.files import atomic_write

SUFFIXES = {
    'onnx': '.onnx',
    'openvino': '.xml',
    'pt2': '.pt2',
    'torch.export': '.pt2',  # the same as pt2
    'torchscript': '.pt',
    'safetensors': '.safetensors',
}
LIBRARIES = {
    'onnx': ('onnxruntime', 'onnxscript'),
    'openvino': ('openvino', 'onnxscript'),
}
OPSET, OPSETS = 20, range(18, 24)  # default; those that both PyTorch's exporter and onnxruntime support


class Sides(NamedTuple):
    """Heights and widths that a file takes.

    Args:
        least: the smallest.
        multiple: they are multiples of it.
    """

    least: int
    multiple: int = 1

    def dim(self, name: str) -> Any:
        """For torch.export."""
        if self.multiple == 1:
            return Dim(name, min=self.least)
        return self.multiple * Dim(name, min=-(-self.least // self.multiple))

    def fit(self, side: int) -> int:
        """The next side that a file takes."""
        return -(-max(side, self.least) // self.multiple) * self.multiple


def without_special_sizes() -> AbstractContextManager:
    """Keep torch.export from treating batches and sizes of 1 as special cases.

    The setting is private. Where it is missing, the export continues without it, and the comparison shows whether
    the file supports such sizes.
    """
    settings: Any = getattr(torch.fx.experimental, '_config', None)
    return settings.patch(backed_size_oblivious=True) if hasattr(settings, 'backed_size_oblivious') else nullcontext()


def to_graph(exportable: Exportable, image: Tensor, sides: Sides | None) -> ExportedProgram:
    """Trace the graph of operators, without paths of source files.

    Args:
        exportable: what to trace.
        image: an example.
        sides: which heights and widths it takes; None fixes them.
    """
    dims = {0: Dim('batch', min=1)}
    if sides is not None:
        dims |= {2: sides.dim('height'), 3: sides.dim('width')}
    options: dict[str, Any] = {'prefer_deferred_runtime_asserts_over_guards': True} if exportable.defers_guards else {}
    with without_special_sizes():
        program = torch.export.export(exportable, (image,), dynamic_shapes=(dims,), strict=False, **options)
    if exportable.defers_guards:
        for node in list(program.graph.nodes):
            if str(node.target).startswith('aten._assert_'):  # such as that no side is 1
                program.graph.erase_node(node)
    graphs = (module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule))
    for node in chain.from_iterable(graph.nodes for graph in graphs):
        node.meta.pop('stack_trace', None)
        node.meta.pop('nn_module_stack', None)
    return program


def write_graph(
    exportable: Exportable, image: Tensor, sides: Sides | None, file: Path, opset: int | None, metadata: Metadata
) -> Run:
    """Write a torch.export file and load it again."""
    program = to_graph(exportable, image, sides)
    program.example_inputs = None
    buffer = io.BytesIO()  # PyTorch's own writer reports a full disk as a RuntimeError
    torch.export.save(program, buffer, extra_files={KEY: metadata.dumps()})
    file.write_bytes(buffer.getvalue())
    return torch.export.load(file).module()


def write_onnx(
    exportable: Exportable, image: Tensor, sides: Sides | None, file: Path, opset: int | None, metadata: Metadata
) -> Run:
    """Write an ONNX file and load it into onnxruntime."""
    import onnxruntime

    save_onnx(exportable, image, sides, file, opset, metadata)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda image: map(torch.from_numpy, session.run(None, {'image': image.numpy()}))


def save_onnx(
    exportable: Exportable, image: Tensor, sides: Sides | None, file: Path, opset: int | None, metadata: Metadata
) -> None:
    """Write an ONNX file of operators of the standard domain."""
    program = to_graph(exportable, image, sides)
    names = {0: 'batch'} | ({} if sides is None else {2: 'height', 3: 'width'})
    with _quiet('torch.onnx'):
        onnx_program = torch.onnx.export(
            program,
            input_names=['image'],
            output_names=list(metadata.outputs),
            opset_version=opset or OPSET,
            dynamic_shapes=(names,),
            custom_translation_table=onnx_translations(),
            dynamo=True,
            verbose=False,
        )
    assert onnx_program is not None  # with dynamo=True
    for node in onnx_program.model.graph:
        node.metadata_props.clear()  # paths of source files
    onnx_program.model.metadata_props[KEY] = metadata.dumps()
    onnx_program.save(file, external_data=False)


def write_openvino(
    exportable: Exportable, image: Tensor, sides: Sides | None, file: Path, opset: int | None, metadata: Metadata
) -> Run:
    """Write OpenVINO's .xml, with the weights in a .bin beside it, and load both again."""
    import openvino

    weights = file.with_suffix('.bin')
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, 'model.onnx')
        save_onnx(exportable, image, sides, onnx, opset, metadata)
        model = openvino.convert_model(onnx)
        model.set_rt_info(metadata.dumps(), [KEY])
        openvino.serialize(model, file, weights)
        core = openvino.Core()
        # By default the CPU plugin computes in bfloat16 where the processor has it.
        compiled = core.compile_model(core.read_model(file, weights), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})

    def run(image: Tensor) -> list[Tensor]:
        result = compiled([image.numpy()])
        return [torch.from_numpy(result[i]) for i in range(len(compiled.outputs))]

    return run


def write_torchscript(
    exportable: Exportable, image: Tensor, sides: Sides | None, file: Path, opset: int | None, metadata: Metadata
) -> Run:
    """Write a TorchScript file of one size and load it again."""
    buffer = io.BytesIO()
    extra = {KEY: metadata.dumps()}
    torch.jit.save(torch.jit.trace(exportable, image, check_trace=False), buffer, _extra_files=extra)
    file.write_bytes(buffer.getvalue())
    return torch.jit.load(str(file))


WRITERS: dict[str, Callable[..., Run]] = {
    'onnx': write_onnx,
    'openvino': write_openvino,
    'pt2': write_graph,
    'torch.export': write_graph,
    'torchscript': write_torchscript,
}


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Suppress log records below ERROR."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextmanager
def output_file(out: Path, to: str) -> Iterator[Path]:
    """A temporary file that replaces ``out`` at the end; with OpenVINO also a .bin beside it.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(out) as file:
        if to != 'openvino':
            yield file
            return
        weights = file.with_suffix('.bin')
        try:
            yield file
            with atomic_write(out.with_suffix('.bin')) as target:
                os.replace(weights, target)
        finally:
            weights.unlink(missing_ok=True)
