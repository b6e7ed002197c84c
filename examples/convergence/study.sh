#!/bin/sh
# The study of README.md: `sh examples/convergence/study.sh OUT TASK OBJECTIVE...` from the root of the repository. TASK is digits, shapes
# or mnist. Every arm has the same number of forward passes, stage 1 counted. What is finished is not repeated, and an interrupted run goes
# on from its checkpoint. SEEDS=0,1,2 are the seeds, ARMS="equal auto ..." some of the arms. START=random begins with fresh weights in the
# place of the teacher's copy, and is four times as long (OUT/TASK-random). `study.py OUT` makes the tables.
#
# Arms, each a comparison of the base method (no trajectory) with a trajectory:
#   equal  the fake score as fast as the generator; the trajectory with its defaults (3 nodes, 20 steps, 3 updates each)
#   auto   the same base method; degrade.nodes = "auto"
#   fast   the fake score twice as fast; degrade.nodes = "auto"
#   five   five steps of the fake score a generator update; degrade.nodes = "auto"
set -e
out=$1 task=$2
shift 2
disback=${DISBACK:-target/release/disback}
case $task in
digits)
    teacher=converters/teachers/edm_unet/teacher.onnx tap=conv2d_12
    reference=examples/digits/digits.npz features=examples/digits/classifier.onnx images=$((240 * 32)) every=20
    ;;
shapes)
    teacher=examples/shapes/teacher.onnx tap=conv2d_9
    reference=examples/shapes/reference.npz features=examples/shapes/features.onnx images=$((120 * 16)) every=10
    [ -f $reference ] || .venv/bin/python examples/shapes/render.py
    ;;
mnist)
    teacher=examples/mnist/teacher.onnx tap=75%
    reference=runs/mnist/data/t10k-images-idx3-ubyte features=examples/mnist/classifier.onnx images=$((200 * 32)) every=20
    ;;
*)
    echo "TASK is digits, shapes or mnist" >&2
    exit 2
    ;;
esac
folder=$task start=""
case ${START:-copy} in
copy) ;;
random) folder=$task-random start="--set student.init=random" images=$((images * 4)) every=$((every * 4)) ;;
*)
    echo "START is copy or random" >&2
    exit 2
    ;;
esac
for objective in "$@"; do
    # Forward passes of a generator update of the equal arm: student and fake score in training, target and fake score for the generator.
    passes=4 more=$start
    case $objective in
    sid) more="$more --set student.sigma_init=2.5 --set noise.generator=[0,800]" ;;
    dmd2) more="$more --set gan.data=$reference --set gan.taps=[\"$tap\"]" passes=7 ;;
    esac
    compare() {
        arm=$1 looks=$2
        shift 2
        # shellcheck disable=SC2086
        "$disback" compare $teacher -o "$out/$folder/$objective/$arm" --config "examples/convergence/$task.toml" \
            --set "objective=$objective" --reference $reference --features $features --seeds "${SEEDS:-0,1,2}" \
            --every $looks --samples 1024 --budget $((images * passes)) $more "$@"
    }
    for arm in ${ARMS:-equal auto fast five}; do
        case $arm in
        equal) compare equal $every ;;
        auto) compare auto $every --set degrade.nodes=auto --base "$out/$folder/$objective/equal" ;;
        fast) compare fast $every --set degrade.nodes=auto --set backtrack.lr_fake=0 ;;
        five) compare five $((every / 4)) --set degrade.nodes=auto --set backtrack.ratio=5 ;;
        *) echo "no arm $arm" >&2 && exit 2 ;;
        esac
    done
done
