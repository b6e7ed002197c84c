#!/bin/sh
# Does the trajectory pay? `sh examples/convergence/run.sh OUT TASK INIT [OBJECTIVE...]` from the root of the repository: each
# objective with and without it, at the same number of forward passes. TASK is digits or shapes, INIT the student's weights at
# the start: given (the teacher's) or random. SEEDS=0,1,2 are fewer seeds, FAKE=2e-4 another rate of the fake score, RATIO=2
# its steps a generator update, UPDATES=400 the base method's generator updates, SET="key=value ..." anything else, BASE=OUT an
# earlier folder whose runs of the base method serve again. What is finished is not repeated; the last folder's compare.svg and
# compare.md show all objectives.
set -e
out=$1 task=$2 init=$3
shift 3
[ $# -gt 0 ] || set -- diff-instruct dmd sid dmd2
disback=${DISBACK:-target/release/disback}
case $task in
digits)
    teacher=converters/teachers/edm_unet/teacher.onnx tap=conv2d_12
    reference=examples/digits/digits.npz features=examples/digits/classifier.onnx
    images=$((${UPDATES:-240} * 32)) every=20
    ;;
shapes)
    teacher=examples/shapes/teacher.onnx tap=conv2d_9
    reference=examples/shapes/reference.npz features=examples/shapes/features.onnx
    images=$((${UPDATES:-120} * 16)) every=10
    [ -f $reference ] || .venv/bin/python examples/shapes/render.py
    ;;
*)
    echo "TASK is digits or shapes" >&2
    exit 2
    ;;
esac
beside="" ratio=${RATIO:-1} more=""
for pair in $SET; do more="$more --set $pair"; done
for objective in "$@"; do
    # Forward passes of a generator update: student and fake score in training, each step; target and fake score for the generator.
    passes=$((2 * ratio + 2))
    case $objective in
    sid) own="--set student.sigma_init=2.5 --set noise.generator=[0,800]" ;;
    dmd2) own="--set gan.data=$reference --set gan.taps=[\"$tap\"]" passes=$((4 * ratio + 3)) ;;
    *) own="" ;;
    esac
    [ -z "$BASE" ] || own="$own --base $BASE/$objective"
    # shellcheck disable=SC2086
    "$disback" compare $teacher -o "$out/$objective" --config "examples/convergence/$task.toml" \
        --set "objective=$objective" --set "student.init=$init" --set "backtrack.lr_fake=${FAKE:-4e-4}" \
        --set "backtrack.ratio=$ratio" $more $own \
        --reference $reference --features $features --seeds "${SEEDS:-0,1,2,3,4}" --every $every --samples 1024 \
        --budget $((images * passes)) $beside
    beside="$beside --beside $out/$objective"
done
