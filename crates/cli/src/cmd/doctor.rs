//! `godwit doctor`: what this machine has and lacks.

use std::path::PathBuf;

use clap::Args;
use godwit_qemu::Binaries;
use godwit_qemu::doctor::{Check, Subject, Verdict, check};

use crate::failure::{Outcome, Result};
use crate::out::{self, Format, Row};

/// `godwit doctor`.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    /// Directory for the memory of machines
    #[arg(long, default_value = "/dev/shm", value_name = "DIR")]
    ram: PathBuf,
    /// Directory for images and disks
    #[arg(long, default_value = "/var/lib", value_name = "DIR")]
    data: PathBuf,
}

const fn word(v: Verdict) -> &'static str {
    match v {
        Verdict::Good => "good",
        Verdict::Limited => "limited",
        Verdict::Missing => "MISSING",
    }
}

impl Row for Check {
    const COLUMNS: &'static [&'static str] = &["CHECK", "STATUS", "FOUND", "ADVICE"];
    const WIDE: usize = 3;
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            word(self.verdict).into(),
            self.found.clone(),
            self.advice.clone().unwrap_or_default(),
        ]
    }
    fn name(&self) -> String {
        self.name.clone()
    }
}

impl Doctor {
    pub(crate) async fn run(self) -> Result {
        let dir = tempfile_dir();
        let subject = Subject {
            binaries: Binaries::default(),
            memory_dir: self.ram,
            data_dir: self.data,
            probe_cache: dir.join("godwit-accel-probe.json"),
        };
        // What is found now counts, not what an earlier probe found.
        let _ = std::fs::remove_file(&subject.probe_cache);
        let mut found = check(&subject).await;
        found.push(networks());
        let _ = std::fs::remove_file(&subject.probe_cache);
        out::list(self.output, &found)?;
        if self.output == Format::Table {
            for c in &found {
                if let Some(a) = &c.advice {
                    out::notice(&format!("{}: {}", out::plain(&c.name), out::plain(a)));
                }
            }
        }
        let missing = found.iter().any(|c| c.verdict == Verdict::Missing);
        Ok(if missing { Outcome::Found } else { Outcome::Done })
    }
}

/// Whether machines here can be in networks; without, they are where QEMU's own network is.
fn networks() -> Check {
    let lacks = godwit_site::networks_lack();
    let verdict = if lacks.is_empty() { Verdict::Good } else { Verdict::Limited };
    let found = match lacks.is_empty() {
        true => "nftables, dnsmasq, TAP interfaces".to_owned(),
        false => lacks.join("; "),
    };
    let advice = "machines of this host can be in no network: run scripts/setup as root";
    let advice = (!lacks.is_empty()).then(|| advice.to_owned());
    Check { name: "networks".into(), verdict, found, advice }
}

fn tempfile_dir() -> PathBuf {
    let run = PathBuf::from("/run/godwit");
    if std::fs::create_dir_all(&run).is_ok() { run } else { std::env::temp_dir() }
}
