#!/bin/sh
# Does the trajectory pay? `sh examples/convergence/run.sh OUT TASK INIT [OBJECTIVE...]` from the root of the repository: each
# objective with and without it, three seeds. TASK is digits or shapes, INIT the student's weights at the start: given (the
# teacher's) or random. What is finished is not repeated; the last folder's compare.svg and compare.md show all objectives.
set -e
out=$1 task=$2 init=$3
shift 3
[ $# -gt 0 ] || set -- diff-instruct dmd sid dmd2
disback=${DISBACK:-target/release/disback}
case $task in
digits)
    teacher=converters/teachers/edm_unet/teacher.onnx tap=conv2d_12
    reference=examples/digits/digits.npz features=examples/digits/classifier.onnx
    ;;
shapes)
    teacher=examples/shapes/teacher.onnx tap=conv2d_9
    reference=examples/shapes/reference.npz features=examples/shapes/features.onnx
    [ -f $reference ] || .venv/bin/python examples/shapes/render.py
    ;;
*)
    echo "TASK is digits or shapes" >&2
    exit 2
    ;;
esac
beside=""
for objective in "$@"; do
    case $objective in
    sid) own="--set student.sigma_init=2.5 --set noise.generator=[0,800]" ;;
    dmd2) own="--set gan.data=$reference --set gan.taps=[\"$tap\"]" ;;
    *) own="" ;;
    esac
    # shellcheck disable=SC2086
    "$disback" compare $teacher -o "$out/$objective" --config "examples/convergence/$task.toml" \
        --set "objective=$objective" --set "student.init=$init" $own --reference $reference --features $features \
        --seeds 0,1,2 --every 20 --samples 1024 $beside
    beside="$beside --beside $out/$objective"
done
