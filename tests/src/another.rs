//! Another AP beside the usual one.

use std::process::Stdio;
use std::time::Duration;

use crate::cloud::{Cloud, Daemon, Running};
use godwit_testkit::within;

impl Cloud {
    /// Starts an AP called `site` beside the usual one, on the same side of the link, and lets it
    /// join; `flags` are further words of its command line. It ends when it is dropped.
    #[must_use]
    pub fn another_ap(&self, site: &str, flags: &[&str]) -> Running {
        let token = self.file(&format!("join-{site}"));
        std::fs::write(&token, self.token(site)).expect("a file");
        let link = self.link_address(Daemon::Ap);
        let mut command = self.command_at(Daemon::Ap);
        command.args(["ap", "--no-co-scheduling", "--name", site, "--link", &link]);
        command.arg("--join").arg(format!("@{}", token.display()));
        command.arg("--root").arg(self.file("")).args(flags);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let running = Running(command.spawn().expect("starting an AP"));
        within(Duration::from_secs(120), "the AP to be there", || {
            let sites = self.ok(&["site", "list"]);
            let there = sites.as_array()?.iter().find(|s| s["name"] == site)?;
            (there["state"] == "ready").then_some(())
        });
        running
    }
}
