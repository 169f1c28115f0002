//! The loader: keeps a scheduler loaded until it is told to stop, and answers `sched top`.
//!
//! Its socket takes one line, `stats`, and answers with one line of JSON, a [`Snapshot`]. One owner
//! holds the scheduler; signals, requests and the passing of time reach it as events.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use std::{fs, thread};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Config;
use crate::check::{Refusal, core_cookie};
use crate::scheduler::{Exit, LoadError, Scheduler};
use crate::stats::{Counters, LagMeter, Snapshot};

/// How often machines are read for their lag, and the kernel is asked whether it ended us.
const TICK: Duration = Duration::from_secs(1);
/// More starts in a row than this, with no quiet minute between, are a fault of their own.
const MOST_RESTARTS: u32 = 20;
/// What may be asked for is one short word.
const LONGEST_REQUEST: u64 = 64;

/// Why the loader ended other than by being told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ServeError {
    /// It could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The socket cannot be had.
    #[error("the socket {path}")]
    Socket {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Signals cannot be caught.
    #[error("catching signals")]
    Signals(#[source] io::Error),
    /// Its maps cannot be read.
    #[error("reading the scheduler's maps")]
    Maps(#[from] libbpf_rs::Error),
    /// The kernel ended it.
    #[error("the kernel has ended the scheduler and uses its own class again: {} ({})", .0.reason, .0.message)]
    Ejected(Exit),
    /// CPUs come and go too fast.
    #[error("CPUs came and went {0} times within a minute each: not loaded again")]
    Restless(u32),
    /// It has become dangerous to go on.
    #[error("unloaded: {0}")]
    Dangerous(Refusal),
}

enum Event {
    Signal,
    Request(UnixStream),
}

/// Why a scheduler was given up in good order, with all that it counted.
pub(crate) struct Served {
    pub(crate) snapshot: Snapshot,
}

struct Loader {
    config: Config,
    scheduler: Scheduler,
    started: Instant,
    restarts: u32,
    /// What earlier loads counted.
    earlier: Counters,
    meter: LagMeter,
    quick_restarts: u32,
}

/// Loads the scheduler and serves until SIGTERM or SIGINT. `loaded` is called once it schedules.
pub(crate) fn serve(
    config: &Config,
    socket: &Path,
    lasting: Option<Duration>,
    loaded: impl FnOnce(&Scheduler),
) -> Result<Served, ServeError> {
    let (to, events) = mpsc::channel();
    catch_signals(to.clone())?;
    let scheduler = Scheduler::load(config)?;
    // Bound only now: the kernel has said that there is no other.
    let _guard = listen(socket, to)?;
    loaded(&scheduler);
    let until = lasting.map(|lasting| Instant::now() + lasting);
    let mut loader = Loader {
        config: config.clone(),
        scheduler,
        started: Instant::now(),
        restarts: 0,
        earlier: Counters::default(),
        meter: LagMeter::default(),
        quick_restarts: 0,
    };
    let mut next = Instant::now() + TICK;
    loop {
        let wake = until.map_or(next, |until| next.min(until));
        match events.recv_timeout(wake.saturating_duration_since(Instant::now())) {
            Ok(Event::Signal) => return loader.stop(),
            Ok(Event::Request(mut stream)) => {
                let line = serde_json::to_string(&loader.snapshot()?).unwrap_or_default();
                // Who asked may have gone.
                let _ = writeln!(stream, "{line}");
            }
            Err(RecvTimeoutError::Timeout) if until.is_some_and(|u| Instant::now() >= u) => {
                return loader.stop();
            }
            Err(RecvTimeoutError::Timeout) => {
                next += TICK;
                loader.tick()?;
            }
            Err(RecvTimeoutError::Disconnected) => return loader.stop(),
        }
    }
}

impl Loader {
    fn tick(&mut self) -> Result<(), ServeError> {
        if let Some(exit) = self.scheduler.exit() {
            return self.ejected(exit);
        }
        if let Some(pid) = core_cookie() {
            return Err(ServeError::Dangerous(Refusal::CoreScheduling { pid }));
        }
        let vms = self.scheduler.vms()?;
        self.meter.take(self.started.elapsed(), &vms);
        Ok(())
    }

    fn ejected(&mut self, exit: Exit) -> Result<(), ServeError> {
        if !exit.restart {
            return Err(ServeError::Ejected(exit));
        }
        let quick = self.scheduler.since().elapsed() < Duration::from_secs(60);
        self.quick_restarts = if quick { self.quick_restarts + 1 } else { 0 };
        if self.quick_restarts > MOST_RESTARTS {
            return Err(ServeError::Restless(self.quick_restarts));
        }
        let mut counters = self.scheduler.counters()?;
        // Accounts went with the vruntimes that they are about.
        *counters.named.entry("lost_ns".to_owned()).or_default() += counters.outstanding_ns;
        counters.outstanding_ns = 0;
        self.earlier.absorb(&counters);
        self.scheduler = reload(&self.config)?;
        self.restarts += 1;
        self.meter = LagMeter::default();
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot, ServeError> {
        self.snapshot_of(self.scheduler.counters()?)
    }

    fn snapshot_of(&self, now: Counters) -> Result<Snapshot, ServeError> {
        let mut counters = self.earlier.clone();
        counters.absorb(&now);
        Ok(Snapshot {
            version: 1,
            mode: self.config.mode,
            alpha: self.config.threshold().to_string(),
            slice_us: self.config.slice.as_micros() as u64,
            vm_by: self.config.vm_by.to_string(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            restarts: self.restarts,
            decision_ns: counters.decision_ns(),
            counters,
            lag: self.meter.lag(),
            vms: self.scheduler.vms()?,
        })
    }

    fn stop(mut self) -> Result<Served, ServeError> {
        if let Some(exit) = self.scheduler.exit().filter(|exit| !exit.restart) {
            return Err(ServeError::Ejected(exit));
        }
        let vms = self.scheduler.vms()?;
        let counters = self.scheduler.detach()?;
        let mut snapshot = self.snapshot_of(counters)?;
        snapshot.vms = vms;
        Ok(Served { snapshot })
    }
}

/// Loads again. The kernel may still be busy with the CPU that came or went, and refuses then.
fn reload(config: &Config) -> Result<Scheduler, LoadError> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match Scheduler::load(config) {
            Err(LoadError::Kernel { .. } | LoadError::Refused(Refusal::Occupied { .. }))
                if Instant::now() < until =>
            {
                thread::sleep(Duration::from_millis(50));
            }
            done => return done,
        }
    }
}

fn catch_signals(to: Sender<Event>) -> Result<(), ServeError> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(ServeError::Signals)?;
    thread::spawn(move || {
        for _ in signals.forever() {
            if to.send(Event::Signal).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Removes the socket at the end.
struct SocketGuard(PathBuf);

impl Drop for SocketGuard {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn listen(path: &Path, to: Sender<Event>) -> Result<SocketGuard, ServeError> {
    let fail = |source| ServeError::Socket { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    // Of an earlier loader: the kernel allows one scheduler, and that is ours now.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(fail)?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // One who connects and says nothing holds up the others for a second at most.
            let asked = stream.set_read_timeout(Some(TICK)).and_then(|()| {
                let mut line = String::new();
                BufReader::new((&stream).take(LONGEST_REQUEST)).read_line(&mut line)?;
                stream.set_write_timeout(Some(TICK))?;
                Ok(line)
            });
            if asked.is_ok_and(|line| line.trim() == "stats")
                && to.send(Event::Request(stream)).is_err()
            {
                return;
            }
        }
    });
    Ok(SocketGuard(path.to_owned()))
}

/// Asks a loader for its snapshot.
pub(crate) fn ask(socket: &Path) -> Result<Snapshot, ServeError> {
    let fail = |source| ServeError::Socket { path: socket.to_owned(), source };
    let mut stream = UnixStream::connect(socket).map_err(fail)?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(fail)?;
    stream.write_all(b"stats\n").map_err(fail)?;
    let mut line = String::new();
    BufReader::new(stream.take(64 << 20)).read_line(&mut line).map_err(fail)?;
    serde_json::from_str(&line).map_err(|error| fail(error.into()))
}
