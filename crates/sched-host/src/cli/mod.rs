//! The commands `sched run` and `sched observe`: their arguments and what they print.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::BadConfig;
use crate::journal::JournalError;
use crate::service::StartError;

mod observe;
mod run;

pub use observe::ObserveArgs;
pub use run::RunArgs;

/// What a command ends with.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The arguments make no sense.
    #[error("{0}")]
    Usage(String),
    /// What is printed can't be written.
    #[error("writing to the terminal")]
    Output(#[source] io::Error),
    /// The host's threads can't be read.
    #[error("reading the threads of this host")]
    Proc(#[source] io::Error),
    /// The service does not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The service ended by itself.
    #[error("the service ended by a fault of its own; what it had changed was put back")]
    Fault,
    /// Something that was changed could not be put back.
    #[error("{0} changes could not be put back; the next start tries again")]
    NotRestored(u64),
    /// Signals can't be waited for.
    #[error("waiting for signals")]
    Signals(#[source] io::Error),
}

impl CliError {
    /// The exit status that goes with it: 2 for usage, 5 where the host's state refuses, else 1.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Start(StartError::Config(BadConfig { .. })) => 2,
            Self::Start(StartError::Journal(JournalError::Held { .. })) => 5,
            Self::Output(_)
            | Self::Proc(_)
            | Self::Signals(_)
            | Self::Start(_)
            | Self::Fault
            | Self::NotRestored(_) => 1,
        }
    }
}

/// Whether somebody asked for the end (Ctrl-C, SIGTERM, a terminal that went away).
struct Asked(std::cell::RefCell<Signals>);

impl Asked {
    fn listen() -> Result<Self, CliError> {
        let signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(CliError::Signals)?;
        Ok(Self(std::cell::RefCell::new(signals)))
    }

    fn now(&self) -> bool {
        self.0.borrow_mut().pending().next().is_some()
    }
}

/// One line on the terminal that is written over; nothing where there is no terminal.
struct Progress {
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    fn new() -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Self { shown: None, terminal: io::stderr().is_terminal() && !dumb }
    }

    fn show(&mut self, line: impl FnOnce() -> String) {
        let due = self.shown.is_none_or(|at| at.elapsed() >= Duration::from_millis(500));
        if self.terminal && due {
            self.shown = Some(Instant::now());
            // A progress line that can't be written is not missed.
            let _ = write!(io::stderr(), "\r\x1b[K{}", line());
        }
    }

    fn clear(&mut self) {
        if self.shown.take().is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        // Whoever read has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(CliError::Output),
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".into(), |s| format!("{:.1}%", s * 100.0))
}

/// Seconds as a duration, within bounds.
fn seconds(what: &str, value: f64) -> Result<Duration, CliError> {
    let fine = value.is_finite() && (0.1..=86_400.0 * 365.0).contains(&value);
    fine.then(|| Duration::from_secs_f64(value))
        .ok_or_else(|| CliError::Usage(format!("{what} must be between 0.1 and a year")))
}
