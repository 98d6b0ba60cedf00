"""A short run that saves a series of checkpoints."""

VOCAB_SIZE = 500
NUM_EXPERTS = 4
SPLIT = "70,30,0"
ITERATIONS = (2, 4, 6)
DATA = f"--data-path data --split {SPLIT} --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
TRAINING = f"""{DATA} --num-layers 3 --moe-layer-freq [1,0,1] --hidden-size 32 --num-attention-heads 2
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --num-experts {NUM_EXPERTS} --ffn-hidden-size 40
    --moe-ffn-hidden-size 24 --moe-router-topk 2 --routing-mask mask.safetensors --init-method-std 0.3
    --micro-batch-size 4 --global-batch-size 4 --lr 3e-2 --lr-decay-style constant --eval-iters 0 --num-workers 0
    --train-iters {ITERATIONS[-1]} --save-interval {ITERATIONS[0]} --save checkpoints"""
