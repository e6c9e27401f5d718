"""The console command. It loads PyTorch, which takes seconds, only where Ctrl-C is answered without
a traceback."""


def main() -> int:
    "`rotvq.cli.main`; 130 if interrupted, while it loads too."
    try:
        from rotvq.cli import main

        return main()
    except KeyboardInterrupt:
        return 130
