"""Turn text into token ids on disk, without torch or Megatron, so that command line tools start quickly."""
