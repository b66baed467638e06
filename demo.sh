#!/bin/sh
# Train SSDlite on drawn shapes on two CPU cores, from random weights, and score it on pictures it has not seen.
# Usage: demo.sh FOLDER_OF_PYTHON [FLAGS OF train.py ...]
set -eu
bin=$1
shift

folder=runs/demo
number=2
while [ -e "$folder" ]; do # an earlier run stays
    folder=runs/demo-$number
    number=$((number + 1))
done

echo "This trains SSDlite on drawn shapes, from random weights, and scores it on other pictures."
echo "It takes about two and a half minutes on two idle cores. The first losses come after some 15 seconds;"
echo "they begin above 10 and should end below 1. AP50, printed at the end, should be above 0.8."
started=$(date +%s)

# One process per core and one thread per process. Small batches make many updates; channels-last takes a third off the
# time of a CPU's convolutions.
export OMP_NUM_THREADS=1
"$bin/torchrun" --standalone --nproc_per_node=2 "$(dirname "$0")/train.py" --dataset shapes \
    --model ssdlite320_mobilenet_v3_large --device cpu --batch-size 4 --workers 0 --channels-last \
    --opt adamw --lr 0.002 --lr-scheduler cosineannealinglr --warmup-iters 40 --epochs 5 --eval-every 5 \
    --output-dir "$folder" "$@"

echo "Done in $(($(date +%s) - started)) seconds. Open this page in a browser: $folder/report.html"
