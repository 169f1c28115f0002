//! Running commands, and waiting for states.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_testkit::within;
use serde_json::Value;

/// How long one command may take.
const COMMAND_WITHIN: Duration = Duration::from_secs(240);

/// How a command ended and what it said.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The command line.
    pub line: String,
    /// Exit code; -1 for a signal.
    pub exit: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Answer {
    /// Standard output as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("{}: {e} in {:?}", self.line, self.stdout))
    }
}

/// Runs a command that is talked to: whenever it has written the text of the next of `keys`,
/// those are sent. Gives all that it wrote.
pub(crate) fn converse(mut command: Command, line: &str, keys: &[(&str, &[u8])]) -> String {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("starting {line}: {e}"));
    let mut to = child.stdin.take().expect("its input");
    let mut from = child.stdout.take().expect("its output");
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut part = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut part) {
            if sender.send(part[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + COMMAND_WITHIN;
    let (mut all, mut seen, mut keys) = (String::new(), 0, keys.iter());
    let mut next = keys.next();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left) {
            Ok(part) => all.push_str(&String::from_utf8_lossy(&part)),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            Err(_) => {
                let _ = child.kill();
                panic!("{line} took longer than {COMMAND_WITHIN:?}: {all:?}");
            }
        }
        while let Some((text, press)) = next
            && let Some(at) = all[seen..].find(text)
        {
            seen += at + text.len();
            to.write_all(press).unwrap_or_else(|e| panic!("typing to {line}: {e}"));
            next = keys.next();
        }
    }
    let status = child.wait().unwrap_or_else(|e| panic!("waiting for {line}: {e}"));
    assert!(status.success(), "{line}: {status}: {all:?}");
    all
}

/// A command that runs on beside the test, and the lines that it writes.
#[derive(Debug)]
pub struct Followed {
    child: Child,
    line: String,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Followed {
    pub(crate) fn begin(mut command: Command, line: String) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("starting {line}: {e}"));
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let from = BufReader::new(child.stdout.take().expect("its output"));
        let to = lines.clone();
        std::thread::spawn(move || {
            for text in from.lines().map_while(Result::ok) {
                to.lock().unwrap_or_else(PoisonError::into_inner).push(text);
            }
        });
        Self { child, line, lines }
    }

    /// What it has written so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same as JSON, one value a line.
    #[must_use]
    pub fn json(&self) -> Vec<Value> {
        let value = |l: &String| {
            serde_json::from_str(l).unwrap_or_else(|e| panic!("{}: {e} in {l:?}", self.line))
        };
        self.lines().iter().map(value).collect()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Interrupts it, as Ctrl-C does, and gives its exit code.
    pub fn interrupt(&mut self) -> i32 {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a signal");
        let status =
            within(COMMAND_WITHIN, "a command to end", || self.child.try_wait().expect("wait"));
        status.code().unwrap_or(-1)
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        // What is gone already needs no end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end.
pub(crate) fn run(mut command: Command, line: String) -> Answer {
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("starting {line}: {e}"));
    let read = |from: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut f) = from {
                // What came before an error is what there is to show.
                let _ = f.read_to_end(&mut text);
            }
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let out = read(child.stdout.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
    let err = read(child.stderr.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
    let status = loop {
        match child.try_wait().unwrap_or_else(|e| panic!("waiting for {line}: {e}")) {
            Some(status) => break status,
            None if begun.elapsed() > COMMAND_WITHIN => {
                let _ = child.kill();
                panic!("{line} took longer than {COMMAND_WITHIN:?}");
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    Answer {
        line,
        exit: status.code().unwrap_or(-1),
        stdout: out.join().unwrap_or_default(),
        stderr: err.join().unwrap_or_default(),
        took: begun.elapsed(),
    }
}
