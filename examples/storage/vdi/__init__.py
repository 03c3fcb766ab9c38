"""The disks, addresses and domains of a virtual-desktop platform; knows nothing of job queues.

`python3 -m vdi TASK key=value...` runs one task by hand.
"""
