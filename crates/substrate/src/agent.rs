//! What the guest is asked to do.

use std::time::Duration;

use godwit_qemu::{AgentSession, QemuError};

use crate::error::SubstrateError;

/// Brings the guest to rest.
pub(crate) const BEFORE_DOCK: &str = "/usr/lib/godwit/before-dock";
/// In its environment: the NIC may stay in the guest.
pub(crate) const KEEP_CARD: &str = "GODWIT_CARD=keep";
/// What it says then if the NIC does: its interface is down.
pub(crate) const CARD_KEPT: &str = "card kept";
/// Renews its identity and lets it go on.
pub(crate) const AFTER_ACTIVATE: &str = "/usr/lib/godwit/after-activate";

/// How long a script in the guest may take.
pub(crate) const SCRIPT_WITHIN: Duration = Duration::from_secs(120);

/// The guest's shell.
pub(crate) const SHELL: &str = "/bin/sh";
/// Its arguments that end a [`BEFORE_DOCK`] of which nobody waits for the end.
pub(crate) const END_BEFORE_DOCK: [&str; 2] = [
    "-c",
    "for p in /proc/[0-9]*; do read -r name <$p/comm && [ \"$name\" = before-dock ] && \
     kill -9 ${p#/proc/}; done 2>/dev/null; exit 0",
];

/// Takes from the machine what makes it itself: `after-activate` gives each that is activated its
/// own. The emptied machine-id is how systemd, too, knows an image that is of no machine.
pub(crate) const GENERALISE: [&str; 2] = [
    "-c",
    // Called like the one that brings the guest to rest, so that it is ended like that.
    "set -e; echo before-dock >/proc/$$/comm
: >/etc/machine-id
echo localhost >/proc/sys/kernel/hostname
[ ! -e /etc/hostname ] || echo localhost >/etc/hostname
rm -f /etc/ssh/ssh_host_* /var/lib/dbus/machine-id /var/lib/systemd/random-seed \
    /var/lib/systemd/credential.secret /var/lib/dhcp/*.leases /var/lib/NetworkManager/*lease*
[ ! -s /etc/machine-id ]
for left in /etc/ssh/ssh_host_*; do [ ! -e \"$left\" ]; done",
];
/// Ends well in a machine that [`GENERALISE`] has made nobody.
pub(crate) const IS_NOBODY: [&str; 2] =
    ["-c", "[ -e /etc/machine-id ] && ! [ -s /etc/machine-id ]"];

/// Runs a program in the guest; gives what it says.
pub(crate) async fn run_script(
    agent: &mut AgentSession<'_>,
    script: &'static str,
    args: &[&str],
    env: &[String],
    within: Duration,
) -> Result<String, SubstrateError> {
    let out = agent
        .exec(script, args, env, &[], within)
        .await
        .map_err(|e| SubstrateError::machine("talking to the guest")(QemuError::Agent(e)))?;
    if out.ok() {
        return Ok(out.text());
    }
    let how = match (out.exit, out.signal) {
        (Some(n), _) => format!("exit status {n}"),
        (None, Some(n)) => format!("signal {n}"),
        (None, None) => "unknown end".to_owned(),
    };
    let output = String::from_utf8_lossy(&out.stderr);
    let output: Vec<char> = output.trim().chars().filter(|c| !c.is_control()).collect();
    let output = output[output.len().saturating_sub(400)..].iter().collect();
    Err(SubstrateError::Script { script, how, output })
}
