"""The ONNX checker with full_check on every student and same-graph file below a folder.

    python check_models.py FOLDER

The same graph must differ from its teacher in initializers and metadata only.
"""

import sys
from pathlib import Path

import onnx

checked = 0
for path in sorted(Path(sys.argv[1]).glob("*/student.onnx")):
    onnx.checker.check_model(str(path), full_check=True)
    same = path.with_name("same.onnx")
    onnx.checker.check_model(str(same), full_check=True)
    model, teacher = onnx.load(same), onnx.load(path.with_name("model.onnx"))
    calls = lambda m: [(n.op_type, n.name, list(n.output)) for n in m.graph.node]  # noqa: E731
    assert calls(model) == calls(teacher), f"{same}: nodes differ from the teacher's"
    assert [v.name for v in model.graph.input] == [v.name for v in teacher.graph.input], same
    student = onnx.load(path)
    assert {o.domain: o.version for o in student.opset_import} == {o.domain: o.version for o in teacher.opset_import}
    assert student.graph.input[0].name == "noise" and student.graph.output[0].name == "sample"
    assert not student.graph.value_info
    checked += 1
assert checked >= 10, f"only {checked} students found"
print(f"{checked} students and their same-graph files pass the checker")
