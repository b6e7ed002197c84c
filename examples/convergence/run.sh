#!/bin/sh
# Does the trajectory pay on digits? `sh examples/convergence/run.sh OUT [OBJECTIVE...]` from the root of the repository:
# each objective with and without it, three seeds, judged by the digits classifier's features.
set -e
out=$1
shift
[ $# -gt 0 ] || set -- diff-instruct dmd sid dmd2
for objective in "$@"; do
    case $objective in
    sid) own="--set student.sigma_init=2.5 --set noise.generator=[0,800]" ;;
    dmd2) own="--set gan.data=examples/digits/digits.npz --set gan.taps=[\"conv2d_5\"]" ;;
    *) own="" ;;
    esac
    # shellcheck disable=SC2086
    target/release/disback compare examples/digits/teacher.onnx -o "$out/$objective" \
        --config examples/convergence/digits.toml --set "objective=$objective" $own \
        --reference examples/digits/digits.npz --features examples/digits/classifier.onnx \
        --seeds 0,1,2 --every 20 --samples 2048
done
