"""Where the parts of a run live: DeepSpeed ZeRO over several processes and host memory."""
