#!/bin/sh
# Train SSDlite on drawn shapes for some minutes on the CPU, from random weights, and score it on images it has not seen.
# Usage: demo.sh FOLDER_OF_PYTHON
set -eu
"$1/torchrun" --standalone --nproc_per_node=2 train.py --dataset shapes --model ssdlite320_mobilenet_v3_large \
    --device cpu --batch-size 8 --workers 0 --epochs 4 --eval-every 2 \
    --opt adamw --lr 0.002 --lr-scheduler cosineannealinglr --warmup-iters 30 --output-dir runs/demo
"$1/python" train.py --dataset shapes --model ssdlite320_mobilenet_v3_large --device cpu --workers 0 \
    --test-only --resume runs/demo/weights/checkpoint.pth
