"""What the tests' programs measure of their own memory.

A peak belongs to a process, and pytest has had its own already: such a test runs a program.
"""

STATUS = """
def status(field):
    '''Bytes, from Linux: VmRSS is the memory in use, VmHWM the most there ever was.'''
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
"""
