"""What `import hvdtrain.compat.horovod.elastic` finds: why there is no such module."""

from hvdtrain.compat.horovod import ELSEWHERE

raise ImportError(f"hvdtrain.compat.horovod has no 'elastic': {ELSEWHERE['elastic']}", name="elastic")
