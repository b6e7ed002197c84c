"""corner_cases.py OUT [COUNT [SEED]]: random parameter grids of the operators whose corners implementations disagree about, in
the form of ONNX's own suite, with ONNX Runtime's answers. What ONNX Runtime refuses is left out. Prints how many cases of
each operator were made."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from operator_cases import write

ort.set_default_logger_severity(4)


def i64(values):
    return np.array(values, np.int64)


def f32(values):
    return np.array(values, np.float32)


class Grid:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def ints(self, low, high, count):
        return [int(v) for v in self.rng.integers(low, high, count)]

    def normal(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    def maybe(self, chance):
        return self.rng.random() < chance

    def resize(self):
        opset = self.pick(10, 11, 13, 18, 19)
        mode = self.pick("nearest", "linear", "cubic")
        rank = 4 if mode == "cubic" else self.pick(3, 4, 5)
        shape = [self.pick(1, 2), self.pick(1, 2), *self.ints(1, 7, rank - 2)]
        x = self.normal(*shape)
        attributes = {"mode": mode}
        targets = self.ints(1, 10, rank - 2)
        if self.maybe(0.3):
            targets[self.rng.integers(rank - 2)] = 1
        # A third of the scales are ratios of whole numbers, the rest leave a fraction; some axes stay as they are.
        scales = [t / n if self.maybe(0.4) else float(self.rng.uniform(0.4, 3.2)) for t, n in zip(targets, shape[2:])]
        for k in range(rank - 2):
            if self.maybe(0.2):
                scales[k], targets[k] = 1.0, shape[2 + k]
        scales = [s if int(s * n) > 0 else 1.0 for s, n in zip(scales, shape[2:])]
        if opset == 10:
            attributes["mode"] = self.pick("nearest", "linear")
            return "Resize", opset, [x, f32([1, 1, *scales])], attributes
        modes = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize"]
        modes += ["half_pixel_symmetric"] if opset >= 19 else []
        modes += ["tf_half_pixel_for_nn"] if opset < 13 else []
        attributes["coordinate_transformation_mode"] = self.pick(*modes)
        if mode == "nearest" and self.maybe(0.8):
            attributes["nearest_mode"] = self.pick("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        if mode == "cubic":
            attributes["cubic_coeff_a"] = self.pick(-0.75, -0.5)
        if mode == "cubic" and self.maybe(0.3):
            attributes["exclude_outside"] = 1
        if self.maybe(0.3):
            attributes["extrapolation_value"] = 2.5
        if opset >= 18 and mode != "nearest" and self.maybe(0.25):
            attributes["antialias"] = 1
        axes = opset >= 18 and self.maybe(0.3)
        if axes:
            attributes["axes"] = list(range(2, rank))
        whole = [] if axes else [1, 1]
        roi = None
        if attributes["coordinate_transformation_mode"] == "tf_crop_and_resize":
            low = [0.0] * len(whole) + [float(v) for v in self.rng.uniform(-0.2, 0.5, rank - 2)]
            high = [1.0] * len(whole) + [float(v) for v in self.rng.uniform(0.5, 1.3, rank - 2)]
            roi = f32(low + high)
        elif opset < 13:
            roi = f32([])
        if self.maybe(0.5):
            return "Resize", opset, [x, roi, f32([*whole, *scales])], attributes
        if opset >= 18 and axes and self.maybe(0.3):
            attributes["keep_aspect_ratio_policy"] = self.pick("not_larger", "not_smaller")
        sizes = i64([*([] if axes else shape[:2]), *targets])
        return "Resize", opset, [x, roi, f32([]) if opset < 13 else None, sizes], attributes

    def window(self, rank, dilated, spatial):
        """Attributes of a sliding window."""
        kernel = self.ints(1, 4, rank)
        attributes = {"kernel_shape": kernel, "strides": self.ints(1, 4, rank)}
        if dilated and self.maybe(0.5):
            attributes["dilations"] = self.ints(1, 3, rank)
        auto = self.pick("NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
        if auto == "NOTSET":
            if self.maybe(0.7):
                attributes["pads"] = [int(self.rng.integers(0, k)) for k in kernel + kernel]
        else:
            attributes["auto_pad"] = auto
        return attributes

    def pool(self):
        op = self.pick("AveragePool", "AveragePool", "MaxPool", "LpPool")
        opset = {"AveragePool": self.pick(7, 10, 11, 19, 22), "MaxPool": self.pick(8, 10, 11, 12, 22),
                 "LpPool": self.pick(11, 18, 22)}[op]
        rank = self.pick(1, 2, 2, 3)
        x = self.normal(1, 2, *self.ints(3, 8, rank))
        dilated = (op == "MaxPool" and opset >= 10) or (op == "AveragePool" and opset >= 19) or (op == "LpPool" and opset >= 18)
        attributes = self.window(rank, dilated, x.shape[2:])
        ceil = {"AveragePool": 10, "MaxPool": 10, "LpPool": 18}[op]
        if opset >= ceil and self.maybe(0.4):
            attributes["ceil_mode"] = 1
        if op == "AveragePool" and self.maybe(0.5):
            attributes["count_include_pad"] = 1
        if op == "LpPool":
            attributes["p"] = self.pick(1, 2, 3)
        if op == "MaxPool" and self.maybe(0.3):
            return op, opset, [x], {**attributes, "outputs": 2, "integers": (1,), "storage_order": self.pick(0, 1)}
        return op, opset, [x], attributes

    def pad(self):
        opset = self.pick(2, 11, 13, 18, 19, 21)
        mode = self.pick("constant", "constant", "reflect", "edge", *(["wrap"] if opset >= 19 else []))
        rank = self.pick(1, 2, 3, 4)
        x = self.normal(*self.ints(1, 6, rank))
        low = -2 if self.maybe(0.3) else 0
        if opset == 2:
            return "Pad", opset, [x], {"mode": mode, "pads": self.ints(low, 4, 2 * rank), "value": 0.5}
        inputs = [x, None, f32(0.5) if mode == "constant" and self.maybe(0.7) else None]
        axes = list(range(rank))
        if opset >= 18 and self.maybe(0.5):
            axes = [int(a) for a in self.rng.permutation(rank)[: self.rng.integers(1, rank + 1)]]
            inputs.append(i64([a - rank if self.maybe(0.3) else a for a in axes]))
        inputs[1] = i64(self.ints(low, 4, 2 * len(axes)))
        return "Pad", opset, inputs, {"mode": mode}

    def slice(self):
        opset = self.pick(1, 10, 11, 13)
        rank = self.pick(1, 2, 3)
        x = self.normal(*self.ints(1, 7, rank))
        count = int(self.rng.integers(1, rank + 1))
        axes = [int(a) for a in self.rng.permutation(rank)[:count]]

        def bounds():
            return [self.pick(int(self.rng.integers(-8, 9)), 2**31 - 1, -(2**31)) if self.maybe(0.2) else int(self.rng.integers(-8, 9))
                    for _ in range(count)]

        starts, ends = bounds(), bounds()
        if opset == 1:
            return "Slice", opset, [x], {"starts": starts, "ends": ends, "axes": axes}
        inputs = [x, i64(starts), i64(ends), i64([a - rank if opset > 10 and self.maybe(0.3) else a for a in axes])]
        if self.maybe(0.7):
            inputs.append(i64([self.pick(1, 2, 3, -1, -2, -3) for _ in range(count)]))
        return "Slice", opset, inputs, {}

    def grid_sample(self):
        opset = self.pick(16, 20)
        rank = 2 if opset == 16 else self.pick(2, 3)
        linear, cubic = ("bilinear", "bicubic") if opset == 16 else ("linear", "cubic")
        mode = self.pick(linear, "nearest", *([cubic] if rank == 2 else []))
        x = self.normal(2, 2, *self.ints(1, 6, rank))
        grid = self.rng.uniform(-1.6, 1.6, (2, *self.ints(1, 5, rank), rank)).astype(np.float32)
        attributes = {"mode": mode, "padding_mode": self.pick("zeros", "border", "reflection"), "align_corners": self.pick(0, 1)}
        return "GridSample", opset, [x, grid], attributes

    def conv(self):
        rank = self.pick(1, 2, 2, 3)
        groups = self.pick(1, 1, 2)
        x = self.normal(1, 2 * groups, *self.ints(3, 8, rank))
        attributes = self.window(rank, True, x.shape[2:])
        w = self.normal(2 * groups, 2, *attributes["kernel_shape"])
        if self.maybe(0.3):
            del attributes["kernel_shape"]
        inputs = [x, w] + ([self.normal(2 * groups)] if self.maybe(0.5) else [])
        return "Conv", self.pick(1, 11, 22), inputs, {**attributes, "group": groups}

    def conv_transpose(self):
        rank = self.pick(1, 2, 2)
        groups = self.pick(1, 1, 2)
        x = self.normal(1, 2 * groups, *self.ints(2, 6, rank))
        attributes = self.window(rank, True, x.shape[2:])
        w = self.normal(2 * groups, 2, *attributes["kernel_shape"])
        strides = attributes["strides"]
        if self.maybe(0.3):
            attributes["output_padding"] = [int(self.rng.integers(0, s)) for s in strides]
        if self.maybe(0.25):
            attributes.pop("pads", None)
            attributes["output_shape"] = [max(1, n * s + int(self.rng.integers(-1, 2))) for n, s in zip(x.shape[2:], strides)]
        inputs = [x, w] + ([self.normal(2 * groups)] if self.maybe(0.5) else [])
        return "ConvTranspose", self.pick(1, 11, 22), inputs, {**attributes, "group": groups}


FAMILIES = ["resize", "pool", "pad", "slice", "grid_sample", "conv", "conv_transpose"]


def main():
    root = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 60
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 7
    for k, family in enumerate(FAMILIES):
        grid = Grid([seed, k])
        made = 0
        for i in range(count * (3 if family == "resize" else 1)):
            op, opset, inputs, attributes = getattr(grid, family)()
            try:
                write(root, f"{family}_{i:04}", op, inputs, domain="", opset=opset, **attributes)
                made += 1
            except Exception as e:  # ONNX Runtime says no in many types
                if "ONNXRuntimeError" not in str(e) and "onnxruntime" not in type(e).__module__:
                    raise
        print(family, made)


if __name__ == "__main__":
    main()
