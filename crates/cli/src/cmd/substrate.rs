//! `godwit substrate`: docked machines in the pool.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use futures::StreamExt;
use godwit_cloud::registry::{EventKind, SubstrateRecord};
use godwit_substrate::ArchiveEnd;
use godwit_types::Name;
use indicatif::ProgressBar;
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use crate::args::{Change, ClientArgs, Named};
use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::out::{self, Row, size};
use crate::wait::{change_and_report, style};
use crate::watch::{Watch, Watched, watch};

#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List substrates
    #[command(visible_alias = "ls")]
    List {
        /// Keep the list up to date
        #[arg(short, long)]
        watch: bool,
    },
    /// Show one substrate
    Get {
        /// Name or id
        substrate: Named,
    },
    /// Remove a substrate from every site
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id
        substrate: Named,
        #[command(flatten)]
        how: Change,
    },
    /// Boot the disk that a substrate stores and dock it again in its place, when its saved state
    /// can no longer be loaded
    Rebuild {
        /// Name or id
        substrate: Named,
        #[command(flatten)]
        how: Change,
    },
    /// Write a substrate to one file
    Export {
        /// Name or id
        substrate: Named,
        /// The file; `-` for stdout
        file: PathBuf,
    },
    /// Take a substrate from a file
    Import {
        /// The file; `-` for stdin
        file: PathBuf,
        /// Its name here, if not the one it brings; it is a substrate of its own then
        #[arg(long)]
        name: Option<Name>,
        /// The site that gets it; the center when left out
        #[arg(long)]
        site: Option<Name>,
    },
}

impl Row for SubstrateRecord {
    const COLUMNS: &'static [&'static str] = &[
        "NAME", "KIND", "IMAGE", "MEMORY", "STORED", "AGE", "HOLDERS", "VCPUS", "ARCH", "RAW",
        "TENANT", "OWNER", "ID",
    ];
    const WIDE: usize = 7;
    fn cells(&self) -> Vec<String> {
        let shown = |n: &Name| match self.damaged.contains_key(n) {
            true => format!("{n} (damaged)"),
            false => n.to_string(),
        };
        let holders: Vec<_> = self.holders.iter().map(shown).collect();
        vec![
            self.name.to_string(),
            self.kind.to_string(),
            self.image.to_string(),
            self.memory.to_string(),
            size(self.stored_bytes),
            out::age(self.created),
            holders.join(","),
            self.vcpus.to_string(),
            self.arch.to_string(),
            size(self.raw_bytes),
            self.tenant.to_string(),
            self.owner.to_string(),
            self.id.to_string(),
        ]
    }
    fn name(&self) -> String {
        out::of_tenant(&self.tenant, &self.name)
    }
}

impl Watch for SubstrateRecord {
    const KIND: EventKind = EventKind::Substrate;
    type Record = Self;
    fn of(record: Self) -> Self {
        record
    }
    fn key(&self) -> String {
        self.id.to_string()
    }
}

impl CommandArgs {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        let format = self.client_args.output;
        match self.verb {
            Verb::List { watch: true } => {
                let keep = Box::new(|_: &SubstrateRecord| true);
                let what = Watched { list: "/v1/substrates", only: None, keep };
                return watch(&self.client_args, what).await;
            }
            Verb::List { watch: false } => {
                let all: Vec<SubstrateRecord> = client.get("/v1/substrates").await?;
                out::list(format, &all)?;
            }
            Verb::Get { substrate } => {
                let one: SubstrateRecord = client
                    .get(&format!("/v1/substrates/{substrate}", substrate = substrate.path()))
                    .await?;
                out::one(format, &one)?;
            }
            Verb::Delete { substrate, how } => {
                let path = format!("/v1/substrates/{substrate}", substrate = substrate.path());
                let words = format!("{substrate}   deleted");
                let line = (substrate.as_str(), words.as_str());
                let request = (Method::DELETE, path.as_str());
                return change_and_report(
                    &client,
                    &self.client_args,
                    &how,
                    request,
                    &serde_json::json!({}),
                    line,
                )
                .await;
            }
            Verb::Rebuild { substrate, how } => {
                let path =
                    format!("/v1/substrates/{substrate}/rebuild", substrate = substrate.path());
                let words = format!("{substrate}   rebuilt");
                let line = (substrate.as_str(), words.as_str());
                let request = (Method::POST, path.as_str());
                let body = serde_json::json!({});
                return change_and_report(&client, &self.client_args, &how, request, &body, line)
                    .await;
            }
            Verb::Export { substrate, file } => export(&client, &substrate, &file).await?,
            Verb::Import { file, name, site } => {
                let taken = import(&client, &file, name.as_ref(), site.as_ref()).await?;
                let words = format!("{}   imported, {}", taken.name, size(taken.stored_bytes));
                let data = serde_json::json!({ "substrate": taken });
                out::action(format, &words, taken.name.as_str(), &data)?;
            }
        }
        Ok(Outcome::Done)
    }
}

fn meter(total: Option<u64>) -> ProgressBar {
    if !out::shows_progress() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::no_length();
    bar.set_style(style("{spinner} {bytes} {bytes_per_sec}"));
    if let Some(t) = total {
        bar.set_length(t);
        bar.set_style(style("{bar:24} {bytes} of {total_bytes}, {bytes_per_sec}"));
    }
    bar
}

async fn export(client: &Client, substrate: &Named, file: &Path) -> Result<()> {
    let request = client.request(
        Method::GET,
        &format!("/v1/substrates/{substrate}/export", substrate = substrate.path()),
    );
    if file.as_os_str() == "-" {
        if std::io::stdout().is_terminal() {
            return Err(Failure::usage("a substrate is not for a terminal").hint("name a file"));
        }
        let answer = client.send(request).await?;
        return copy(client, answer, &mut tokio::io::stdout(), "stdout").await;
    }
    // Through links to the file that is meant.
    let file = &std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    match std::fs::metadata(file) {
        Ok(m) if m.is_dir() => {
            return Err(Failure::usage(format!("{} is a directory", file.display())));
        }
        // A device or a pipe is written to, not replaced.
        Ok(m) if !m.is_file() => {
            let name = file.display().to_string();
            let failed = |e: std::io::Error| Failure::internal(format!("writing {name}: {e}"));
            let to = tokio::fs::File::options().write(true).open(file).await;
            let mut to = to.map_err(failed)?;
            let answer = client.send(request).await?;
            return copy(client, answer, &mut to, &name).await;
        }
        _ => {}
    }
    // Under its own name only when it is whole.
    let mut part = file.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(part);
    let failed = |e: std::io::Error| Failure::internal(format!("writing {}: {e}", part.display()));
    let mut to = tokio::fs::File::create(&part).await.map_err(failed)?;
    let copied = match client.send(request).await {
        Ok(answer) => copy(client, answer, &mut to, &part.display().to_string()).await,
        Err(e) => Err(e),
    };
    let kept = match copied {
        Ok(()) => to.sync_all().await.and_then(|()| std::fs::rename(&part, file)).map_err(failed),
        Err(e) => Err(e),
    };
    if kept.is_err() {
        // The failure itself is told; a leftover is no other one.
        let _ = std::fs::remove_file(&part);
    } else {
        out::line(&file.display().to_string())?;
    }
    kept
}

async fn copy<W: tokio::io::AsyncWrite + Unpin>(
    client: &Client,
    answer: reqwest::Response,
    to: &mut W,
    name: &str,
) -> Result<()> {
    let bar = meter(answer.content_length());
    let failed = |e: std::io::Error| Failure::internal(format!("writing {name}: {e}"));
    let mut stream = answer.bytes_stream();
    let mut whole = ArchiveEnd::default();
    while let Some(part) = stream.next().await {
        let part = part.map_err(|e| {
            client.broken(&e).hint(
                "the substrate did not come whole; see: godwit pool check, godwit substrate list",
            )
        })?;
        whole.push(&part);
        to.write_all(&part).await.map_err(failed)?;
        bar.inc(part.len() as u64);
    }
    to.flush().await.map_err(failed)?;
    bar.finish_and_clear();
    if !whole.is_whole() {
        return Err(Failure::internal(
            "the substrate did not come whole: its checksum is missing or wrong",
        ));
    }
    Ok(())
}

async fn import(
    client: &Client,
    file: &Path,
    name: Option<&Name>,
    site: Option<&Name>,
) -> Result<SubstrateRecord> {
    let failed = |e: std::io::Error| Failure::usage(format!("reading {}: {e}", file.display()));
    let (from, total): (Box<dyn AsyncRead + Send + Unpin>, _) = if file.as_os_str() == "-" {
        if std::io::stdin().is_terminal() {
            return Err(Failure::usage("a substrate does not come from a terminal")
                .hint("name a file, or send one to standard input"));
        }
        (Box::new(tokio::io::stdin()), None)
    } else {
        let f = tokio::fs::File::open(file).await.map_err(failed)?;
        let meta = f.metadata().await.map_err(failed)?;
        if meta.is_dir() {
            return Err(failed(std::io::ErrorKind::IsADirectory.into()));
        }
        (Box::new(f), meta.is_file().then_some(meta.len()))
    };
    let bar = meter(total);
    let shown = bar.clone();
    let stream = ReaderStream::with_capacity(from, 256 << 10).inspect(move |part| {
        if let Ok(p) = part {
            shown.inc(p.len() as u64);
        }
    });
    let query: Vec<String> = [("name", name), ("site", site)]
        .into_iter()
        .filter_map(|(k, v)| v.map(|v| format!("{k}={v}")))
        .collect();
    let request = client
        .request(Method::POST, &format!("/v1/substrates?{}", query.join("&")))
        .header(CONTENT_TYPE, "application/octet-stream")
        .body(reqwest::Body::wrap_stream(stream));
    let answer = client.send(request).await?;
    let body = client.body(answer).await?;
    bar.finish_and_clear();
    serde_json::from_slice(&body)
        .map_err(|e| Failure::internal(format!("the center's answer is not understood: {e}")))
}
