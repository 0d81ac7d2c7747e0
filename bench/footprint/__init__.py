"""What a tracker takes that has little to do, and what it takes to begin.

python -m bench.footprint [--callbacks 100000] [--lives 2000] [--database both] [--only memory …]

process.py  a tracker as a process, seen from outside: memory, processor time, times it was woken
counted.py  `tracker` that counts the statements it sends
memory.py   resident memory while callbacks come, and while runs live their whole lives
idle.py     processor time, wakings and statements of a process to which nothing happens
startup.py  how long commands take to begin, and what they import
"""
