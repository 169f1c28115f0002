//! One running machine.
//!
//! ```text
//!   boot -> answering <-> busy (a command runs) -> ended (drop, power off, crash)
//! ```
//!
//! Its first serial port is the console, its second the control channel: a unix socket on which
//! the init of the guest says `@ ready`, then takes one command a line and answers with the lines
//! of its output, each behind `| `, and `= STATUS`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::{Error, Initramfs, Kernel};

/// How many lines of the console are kept for whoever asks what happened.
const CONSOLE_LINES: usize = 400;

/// What a guest's time is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The host's time. Each vCPU is a thread of the host, and loses its time where the host does.
    Host,
    /// Instructions: each one executed by any vCPU is so many nanoseconds, 2 to the power of this (0
    /// to 10), so that the guest's time is the same however busy the host is. The vCPUs take turns in
    /// one thread, for a part of the time to the next timer each; a pause instruction ends a turn.
    Instructions(u8),
}

/// What a machine has.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name, also that of QEMU's process: letters, digits and `-`.
    pub name: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Its memory, MiB.
    pub memory_mib: u32,
    /// Added to the kernel's command line.
    pub append: String,
    /// How long it may take from the start of QEMU to the first command.
    pub boot_within: Duration,
    /// What its time is.
    pub clock: Clock,
}

impl Spec {
    /// A machine with `cpus` virtual CPUs and `memory_mib` MiB that has two minutes to boot.
    #[must_use]
    pub fn new(name: impl Into<String>, cpus: u32, memory_mib: u32) -> Self {
        let boot_within = Duration::from_secs(120);
        let clock = Clock::Host;
        Self { name: name.into(), cpus, memory_mib, append: String::new(), boot_within, clock }
    }
}

/// What a command in the guest came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its exit status.
    pub status: i32,
    /// What it wrote to stdout and stderr.
    pub output: String,
}

/// A machine under QEMU's own emulation (TCG, one thread per vCPU, named `CPU n/TCG`). It is
/// killed when this is dropped, and by the kernel when the program that booted it dies.
pub struct Machine {
    name: String,
    pid: Pid,
    pidfd: std::os::fd::OwnedFd,
    console: Arc<Mutex<VecDeque<String>>>,
    lines: Receiver<String>,
    control: UnixStream,
    /// The command that runs and the output that came so far.
    running: Option<(String, String)>,
    attendant: Option<JoinHandle<()>>,
    boot: Duration,
    _dir: TempDir,
}

impl Machine {
    /// Boots a machine and waits until it takes commands.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where QEMU cannot be started, [`Error::Late`] and [`Error::Ended`] where the
    /// guest does not come up.
    pub fn boot(kernel: &Kernel, initramfs: &Initramfs, spec: &Spec) -> Result<Self, Error> {
        let started = Instant::now();
        let dir = tempfile::Builder::new()
            .prefix("godwit-lab-")
            .tempdir()
            .map_err(Error::io("making a directory for a machine"))?;
        let image = dir.path().join("initramfs");
        let file = File::create(&image).map_err(Error::io("creating an initramfs"))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        initramfs.write(&mut file)?;
        file.flush().map_err(Error::io("writing an initramfs"))?;

        // QEMU connects to a socket that is there already, so nobody has to wait for it.
        let socket = dir.path().join("control");
        let listener = UnixListener::bind(&socket).map_err(Error::io("making a control socket"))?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(match spec.clock {
                Clock::Host => vec!["-accel".to_owned(), "tcg,thread=multi".to_owned()],
                Clock::Instructions(shift) => {
                    let icount = format!("shift={},sleep=off", shift.min(10));
                    ["-accel", "tcg,thread=single", "-icount", &icount].map(str::to_owned).into()
                }
            })
            .args(["-machine", "q35", "-cpu", "max"])
            .args(["-smp", &spec.cpus.to_string(), "-m", &format!("{}M", spec.memory_mib)])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-name", &format!("{},debug-threads=on", spec.name)])
            .arg("-kernel")
            .arg(kernel.image())
            .arg("-initrd")
            .arg(&image)
            // On a busy host the kernel's look at its timer interrupt would come to a wrong end.
            .args([
                "-append",
                &format!("console=ttyS0 quiet panic=-1 no_timer_check {}", spec.append),
            ])
            .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
            .args(["-chardev", &format!("socket,id=control,path={}", socket.display())])
            .args(["-serial", "chardev:control"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());

        let console = Arc::default();
        let (pid, attendant) = attend(command, &spec.name, Arc::clone(&console))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
        let pidfd = pidfd.map_err(Error::io("opening QEMU's process"))?;
        let (to, lines) = mpsc::channel();
        let control = match accept(&listener, &attendant, started + spec.boot_within) {
            Ok(control) => control,
            Err(source) => {
                let _ = pidfd_send_signal(&pidfd, Signal::KILL);
                let _ = attendant.join();
                let doing = format!("waiting for QEMU: {}", tail(&console, 5));
                return Err(Error::Io { doing, source });
            }
        };
        let reader = control.try_clone().map_err(Error::io("copying a control socket"))?;
        std::thread::spawn(move || {
            // Ends when QEMU does, which closes the socket, or when the machine is dropped.
            for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if to.send(line).is_err() {
                    return;
                }
            }
        });
        let mut machine = Self {
            name: spec.name.clone(),
            pid,
            pidfd,
            console,
            lines,
            control,
            running: None,
            attendant: Some(attendant),
            boot: Duration::ZERO,
            _dir: dir,
        };
        let until = started + spec.boot_within;
        while machine.line("the guest's first word", spec.boot_within, until)? != "@ ready" {}
        machine.boot = started.elapsed();
        Ok(machine)
    }

    /// Runs a line of shell in the guest and waits for its end.
    ///
    /// # Errors
    ///
    /// [`Error::Late`] after `within`, [`Error::Ended`] with the machine, [`Error::Protocol`]
    /// where one runs already.
    pub fn run(&mut self, command: &str, within: Duration) -> Result<Answer, Error> {
        self.start(command)?;
        self.finish(within)
    }

    /// As [`run`](Self::run), for what has to end with 0; gives its output.
    ///
    /// # Errors
    ///
    /// [`Error::Status`] if it does not, and those of [`run`](Self::run).
    pub fn ok(&mut self, command: &str, within: Duration) -> Result<String, Error> {
        let Answer { status, output } = self.run(command, within)?;
        if status == 0 {
            return Ok(output);
        }
        Err(Error::Status {
            machine: self.name.clone(),
            command: command.to_owned(),
            status,
            output,
        })
    }

    /// Starts a line of shell in the guest; [`finish`](Self::finish) gives its output. Several
    /// machines are so started at once. What is to run beside further commands goes into the
    /// background with `&`.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] where one runs already or the line is not one.
    pub fn start(&mut self, command: &str) -> Result<(), Error> {
        if let Some((other, _)) = &self.running {
            return Err(self.protocol(format!("`{command}` while `{other}` runs")));
        }
        // The guest's terminal takes 4095 bytes a line.
        if command.contains(['\n', '\r', '\0']) || command.len() > 4000 {
            return Err(self.protocol(format!("not one short line: {command}")));
        }
        let doing = format!("sending a command to machine {}", self.name);
        self.control.write_all(format!("{command}\n").as_bytes()).map_err(Error::io(doing))?;
        self.running = Some((command.to_owned(), String::new()));
        Ok(())
    }

    /// Waits for the end of what [`start`](Self::start) started. After [`Error::Late`] it may be
    /// called again.
    ///
    /// # Errors
    ///
    /// [`Error::Late`] after `within`, [`Error::Ended`] with the machine, [`Error::Protocol`]
    /// where nothing runs.
    pub fn finish(&mut self, within: Duration) -> Result<Answer, Error> {
        let Some((command, mut output)) = self.running.take() else {
            return Err(self.protocol("nothing runs".to_owned()));
        };
        let until = Instant::now() + within;
        let what = format!("the end of `{command}`");
        loop {
            let line = match self.line(&what, within, until) {
                Ok(line) => line,
                Err(late) => {
                    self.running = Some((command, output));
                    return Err(late);
                }
            };
            if let Some(text) = line.strip_prefix("| ") {
                output.push_str(text);
                output.push('\n');
            } else if let Some(status) = line.strip_prefix("= ") {
                let status = status.parse().map_err(|_| self.protocol(format!("said {line}")))?;
                return Ok(Answer { status, output });
            }
        }
    }

    /// Waits for a line of the console that contains `marker` (what was said before counts).
    ///
    /// # Errors
    ///
    /// [`Error::Late`] after `within`, [`Error::Ended`] with the machine.
    pub fn wait_console(&self, marker: &str, within: Duration) -> Result<String, Error> {
        let until = Instant::now() + within;
        loop {
            // Read before the look at the lines: what QEMU said last is not missed.
            let ended = self.attendant.as_ref().is_none_or(JoinHandle::is_finished);
            let lines = self.console.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(line) = lines.iter().find(|line| line.contains(marker)) {
                return Ok(line.clone());
            }
            drop(lines);
            let what = format!("`{marker}` on the console");
            if ended {
                return Err(self.ended(&what));
            }
            if Instant::now() > until {
                return Err(self.late(&what, within));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The last lines of the console, oldest first.
    #[must_use]
    pub fn console(&self) -> Vec<String> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// QEMU's process. Its vCPU threads are those named `CPU n/TCG` in `/proc/PID/task`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// The thread of each vCPU, in the order of their numbers.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where QEMU's process cannot be read.
    pub fn vcpu_threads(&self) -> Result<Vec<u32>, Error> {
        let doing = || format!("reading the threads of machine {}", self.name);
        let mut found = Vec::new();
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
        for task in tasks.map_err(Error::io(doing()))? {
            let path = task.map_err(Error::io(doing()))?.path();
            let comm = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            let number = comm.strip_prefix("CPU ").and_then(|c| c.strip_suffix("/TCG\n"));
            let tid = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            if let (Some(Ok(number)), Some(tid)) = (number.map(str::parse::<u32>), tid) {
                found.push((number, tid));
            }
        }
        found.sort_unstable();
        Ok(found.into_iter().map(|(_, tid)| tid).collect())
    }

    /// The machine's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How long it took from the start to the first command.
    #[must_use]
    pub fn boot_time(&self) -> Duration {
        self.boot
    }

    fn line(&mut self, what: &str, within: Duration, until: Instant) -> Result<String, Error> {
        match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => Err(self.late(what, within)),
            Err(RecvTimeoutError::Disconnected) => {
                // What it said last is read before it is quoted.
                self.attendant.take().map(JoinHandle::join);
                Err(self.ended(what))
            }
        }
    }

    fn late(&self, what: &str, within: Duration) -> Error {
        Error::Late {
            machine: self.name.clone(),
            what: what.to_owned(),
            seconds: within.as_secs_f64(),
            tail: tail(&self.console, 20),
        }
    }

    fn ended(&self, what: &str) -> Error {
        let tail = tail(&self.console, 20);
        Error::Ended { machine: self.name.clone(), what: what.to_owned(), tail }
    }

    fn protocol(&self, what: String) -> Error {
        Error::Protocol { machine: self.name.clone(), what }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails only where it has ended already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        if let Some(attendant) = self.attendant.take() {
            let _ = attendant.join();
        }
    }
}

fn tail(console: &Mutex<VecDeque<String>>, lines: usize) -> String {
    let console = console.lock().unwrap_or_else(PoisonError::into_inner);
    let from = console.len().saturating_sub(lines);
    console.iter().skip(from).map(|line| format!("  {line}\n")).collect()
}

/// Starts QEMU on a thread of its own that reads the console and waits for the end. The kernel
/// kills QEMU when the thread that started it ends, which this one does not do before QEMU.
fn attend(
    mut command: Command,
    name: &str,
    console: Arc<Mutex<VecDeque<String>>>,
) -> Result<(Pid, JoinHandle<()>), Error> {
    let (to, started) = mpsc::channel();
    let attendant = std::thread::Builder::new()
        .name(format!("lab {name}"))
        .spawn(move || {
            use std::os::unix::process::CommandExt;
            // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
            unsafe {
                command.pre_exec(|| {
                    let kill = Some(Signal::KILL);
                    Ok(rustix::process::set_parent_process_death_signal(kill)?)
                });
            }
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let _ = to.send(Err(error));
                    return;
                }
            };
            let _ = to.send(Ok(Pid::from_child(&child)));
            read_console(&mut child, &console);
            let _ = child.wait();
        })
        .map_err(Error::io("starting a thread"))?;
    let starting = "starting qemu-system-x86_64 (scripts/setup installs it)";
    let pid = started.recv().map_err(io::Error::other).and_then(|pid| pid);
    Ok((pid.map_err(Error::io(starting))?, attendant))
}

fn read_console(child: &mut Child, console: &Mutex<VecDeque<String>>) {
    let keep = |line: io::Result<Vec<u8>>| -> bool {
        let Ok(line) = line else { return false };
        let mut kept = console.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == CONSOLE_LINES {
            kept.pop_front();
        }
        kept.push_back(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned());
        true
    };
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        if let Some(stderr) = stderr {
            scope.spawn(|| BufReader::new(stderr).split(b'\n').all(keep));
        }
        if let Some(stdout) = stdout {
            BufReader::new(stdout).split(b'\n').all(keep);
        }
    });
}

/// Waits for QEMU's connection, until it ends or the time is over.
fn accept(
    listener: &UnixListener,
    attendant: &JoinHandle<()>,
    until: Instant,
) -> io::Result<UnixStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if attendant.is_finished() {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "QEMU ended at once"));
        }
        if Instant::now() > until {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "QEMU does not connect"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
