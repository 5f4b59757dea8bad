"""The archive: its layout as a pure plan, its shards as bytes, and the store on disk.

Knows nothing of torch, nor of how a log is framed.
"""
