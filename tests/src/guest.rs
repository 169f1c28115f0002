//! What is asked of a guest, by its agent.

use std::time::Duration;

use godwit_testkit::within;
use serde_json::Value;

use crate::cloud::Cloud;

/// Where the witness appends its lines: on the guest's disk.
const LINES: &str = "/data/lines";

/// Memory that the witness keeps changing, in MiB.
const WITNESS_MIB: u32 = 24;

/// How long a guest may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// What a guest takes itself to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its host name.
    pub hostname: String,
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// The address of its network card.
    pub mac: String,
}

/// The guest of one environment.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    cloud: &'a Cloud,
    vm: &'a str,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(cloud: &'a Cloud, vm: &'a str) -> Self {
        Self { cloud, vm }
    }

    /// Runs a line of shell and gives what it printed; `None` when that did not work.
    #[must_use]
    pub fn try_sh(&self, line: &str) -> Option<String> {
        let words = ["vm", "exec", "-o", "json", self.vm, "--", "/bin/busybox", "sh", "-c", line];
        let a = self.cloud.run(&words);
        (a.exit == 0).then(|| a.json()["stdout"].as_str().unwrap_or_default().trim().to_owned())
    }

    /// Runs a line of shell, which must end well.
    #[must_use]
    pub fn sh(&self, line: &str) -> String {
        let words = ["vm", "exec", self.vm, "--", "/bin/busybox", "sh", "-c", line];
        let a = self.cloud.run(&words);
        assert_eq!(a.exit, 0, "in {}: {line}: {}{}", self.vm, a.stdout, a.stderr);
        a.stdout.trim().to_owned()
    }

    /// Waits until the guest does what it is asked.
    pub fn answers(&self) {
        let what = format!("'{}' to answer", self.vm);
        let answer = within(ANSWER_WITHIN, &what, || self.try_sh("echo $((6 * 7))"));
        assert_eq!(answer, "42");
    }

    /// Who it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        let text = self.sh(
            "hostname; cat /etc/machine-id; cat /sys/class/net/e*/address 2>/dev/null | head -1",
        );
        let mut lines = text.lines().map(|l| l.trim().to_owned());
        let mut next = || lines.next().unwrap_or_else(|| panic!("{}: {text:?}", self.vm));
        Identity { hostname: next(), machine_id: next(), mac: next() }
    }

    /// Starts the witness as a user program.
    pub fn start_witness(&self) {
        let _ = self.sh(&format!(
            "/usr/lib/godwit/user-run /usr/lib/godwit/godwit-witness run --memory-mib \
             {WITNESS_MIB} --file {LINES} </dev/null >/dev/null 2>&1 &"
        ));
        self.lines_beyond(0);
    }

    /// What the witness says of itself; its memory must be as it left it.
    #[must_use]
    pub fn witness(&self) -> Value {
        let text = self.sh("/usr/lib/godwit/godwit-witness status");
        let status: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(status["memory_ok"], true, "the memory of '{}': {text}", self.vm);
        status
    }

    /// Waits until the witness has written more than `lines` lines, and says how many.
    pub fn lines_beyond(&self, lines: u64) -> u64 {
        let what = format!("more than {lines} lines in '{}'", self.vm);
        within(ANSWER_WITHIN, &what, || {
            let text = self.try_sh("/usr/lib/godwit/godwit-witness status")?;
            let status: Value = serde_json::from_str(&text).ok()?;
            status["lines"].as_u64().filter(|n| *n > lines)
        })
    }

    /// The witness works on, and its memory and every line are as they were written. Gives the
    /// number of lines.
    pub fn intact(&self, lines_before: u64) -> u64 {
        let lines = self.lines_beyond(lines_before);
        let _ = self.witness();
        let text = self.sh(&format!("/usr/lib/godwit/godwit-witness check --file {LINES}"));
        let check: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(check["ok"], true, "the file of '{}': {text}", self.vm);
        let checked = check["lines"].as_u64().unwrap_or_default();
        assert!(checked >= lines, "{checked} lines of {lines} are there");
        checked
    }

    /// Fills memory with bytes that no two pages share, so that a move has something to carry.
    pub fn fill_memory(&self, mib: u32) {
        let _ = self.sh(&format!(
            "rm -f /tmp/x; dd if=/dev/urandom of=/tmp/x bs=1M count={mib} 2>/dev/null"
        ));
    }
}
