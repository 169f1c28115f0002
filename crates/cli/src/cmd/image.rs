//! `godwit image`: guest images, at the sites or in this machine's own cache.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use godwit_cloud::controller::Unanswered;
use godwit_image::{Image, ImageCache, ImageError, Recipe};
use godwit_site::{ImageInfo, image_info, images_of};
use godwit_types::Fault;
use godwit_types::{Code, Name, SiteKind};
use indicatif::ProgressBar;
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::{Change, ClientArgs, or_env};
use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::interrupt::Interrupt;
use crate::out::{self, Format, Row, size};
use crate::wait::{change_and_report, style};

#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    #[command(flatten)]
    client_args: ClientArgs,
    /// Work on this machine's own cache, without a center
    #[arg(long, global = true, conflicts_with = "api")]
    local: bool,
    /// The cache of this machine [default: /var/cache/godwit/images] [env: GODWIT_IMAGES]
    #[arg(long, global = true, value_name = "DIR")]
    images: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build an image from its recipe; without a center, on this machine
    Build {
        /// The recipes' names; see them with: godwit image list
        #[arg(required = true)]
        names: Vec<Name>,
        /// The site that builds; the center when left out
        #[arg(long, conflicts_with = "local")]
        site: Option<Name>,
        /// Build anew from what the mirrors hold now (on this machine only)
        #[arg(long)]
        again: bool,
        #[command(flatten)]
        how: Change,
    },
    /// List images and recipes
    #[command(visible_alias = "ls")]
    List {
        /// Only at this site
        #[arg(long, conflicts_with = "local")]
        site: Option<Name>,
    },
    /// Remove an image that no machine and no substrate uses
    #[command(visible_alias = "rm")]
    Delete {
        /// Its name
        name: Name,
        /// The site that loses it; all when left out
        #[arg(long, conflicts_with = "local")]
        site: Option<Name>,
        /// With --local: remove it, whoever uses it
        #[arg(long, requires = "local")]
        force: bool,
        #[command(flatten)]
        how: Change,
    },
    /// Show one image; with --local, check its files too
    Inspect {
        /// Its name
        name: Name,
    },
}

/// An image and where it is.
#[derive(Debug, Serialize, Deserialize)]
struct Held {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    site: Option<Name>,
    #[serde(flatten)]
    image: ImageInfo,
}

/// What the center answers.
#[derive(Debug, Deserialize)]
struct Listed {
    images: Vec<Held>,
    unanswered: Vec<Unanswered>,
}

impl Row for Held {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "SITE", "BUILT", "ARCH", "MEMORY", "SIZE", "APP", "VCPUS", "DISPLAY", "HASH"];
    const WIDE: usize = 7;
    fn cells(&self) -> Vec<String> {
        let i = &self.image;
        let yes = |b| if b { "yes" } else { "no" }.to_owned();
        vec![
            i.name.to_string(),
            self.site.as_ref().map_or_else(|| "this machine".into(), Name::to_string),
            if i.fault.is_some() { "damaged".into() } else { yes(i.built) },
            i.arch.to_string(),
            i.memory.to_string(),
            if i.built { size(i.bytes) } else { String::new() },
            i.app.clone().unwrap_or_default(),
            i.vcpus.to_string(),
            yes(i.display),
            i.hash.to_string(),
        ]
    }
    fn name(&self) -> String {
        self.image.name.to_string()
    }
}

fn held(i: &Image) -> Held {
    Held { site: None, image: image_info(i) }
}

impl CommandArgs {
    pub(crate) async fn run(self) -> Result {
        let format = self.client_args.output;
        let center = if self.local { None } else { self.center().await? };
        let wants_site = match &self.verb {
            Verb::Build { site, .. } | Verb::List { site } | Verb::Delete { site, .. } => {
                site.is_some()
            }
            Verb::Inspect { .. } => false,
        };
        if center.is_none() && wants_site {
            return Err(Failure::unavailable("no center is reachable to ask a site")
                .hint("start one with: godwit up, or leave --site out to work on this machine"));
        }
        if center.is_none() && !self.local {
            out::notice("note: no center is up; these are this machine's own images (--local)");
        }
        match (self.verb, center) {
            (Verb::Build { names, site, again: false, how }, Some(client)) => {
                for name in names {
                    let at = site.as_ref().map(|s| format!("?site={s}")).unwrap_or_default();
                    let path = format!("/v1/images/{name}/build{at}");
                    let words = format!("{name}   built");
                    let request = (Method::POST, path.as_str());
                    let line = (name.as_str(), words.as_str());
                    change_and_report(&client, &self.client_args, &how, request, &json!({}), line)
                        .await?;
                }
                Ok(Outcome::Done)
            }
            (Verb::Build { site: Some(_), again: true, .. }, Some(_)) => {
                Err(Failure::usage("--again builds on this machine only").hint("leave --site out"))
            }
            (Verb::Build { names, again, how, .. }, _) => {
                let cache = open(self.images)?;
                build(&cache, &names, again, &how, format).await
            }
            (Verb::List { site }, Some(client)) => {
                let at = site.map(|s| format!("?site={s}")).unwrap_or_default();
                let listed: Listed = client.get(&format!("/v1/images{at}")).await?;
                let mut all = listed.images;
                out::unanswered(&listed.unanswered);
                all.sort_by(|a, b| (&a.image.name, &a.site).cmp(&(&b.image.name, &b.site)));
                out::list(format, &all)?;
                Ok(Outcome::Done)
            }
            (Verb::List { .. }, None) => {
                out::list(format, &local(&open(self.images)?)?)?;
                Ok(Outcome::Done)
            }
            (Verb::Delete { name, site, how, .. }, Some(client)) => {
                let at = site.map(|s| format!("?site={s}")).unwrap_or_default();
                let path = format!("/v1/images/{name}{at}");
                let words = format!("{name}   deleted");
                let request = (Method::DELETE, path.as_str());
                let line = (name.as_str(), words.as_str());
                change_and_report(&client, &self.client_args, &how, request, &json!({}), line).await
            }
            (Verb::Delete { name, force, how, .. }, None) => {
                delete_local(&open(self.images)?, &name, force, &how, format)
            }
            (Verb::Inspect { name }, Some(client)) => {
                let image: ImageInfo = client.get(&format!("/v1/images/{name}")).await?;
                let all = super::site::sites(&client).await?;
                let center = all.into_iter().find(|s| s.record.kind == SiteKind::Center);
                out::one(format, &Held { site: center.map(|s| s.record.name), image })?;
                Ok(Outcome::Done)
            }
            (Verb::Inspect { name }, None) => inspect(&open(self.images)?, &name, format).await,
        }
    }
}

impl CommandArgs {
    /// The center, if there is one to ask. One that is known and does not answer is a failure: its
    /// sites hold other images than this machine. Only a build goes on here when it is not up.
    async fn center(&self) -> Result<Option<Client>> {
        let connect = &self.client_args.connect;
        let named = connect.api.is_some() || connect.config.is_some();
        let known = named || connect.files().ca().exists();
        let client = match Client::open(connect) {
            Ok(client) => client,
            Err(e) if known => return Err(e),
            Err(_) => return Ok(None),
        };
        match client.probe().await {
            Ok(()) => Ok(Some(client)),
            Err(e) if e.refused && !named && matches!(self.verb, Verb::Build { .. }) => Ok(None),
            Err(e) => Err(e.hint(
                "start the center with: godwit up; for this machine's own images say --local",
            )),
        }
    }
}

fn delete_local(
    cache: &ImageCache,
    name: &Name,
    force: bool,
    how: &Change,
    format: Format,
) -> Result {
    if how.dry_run {
        out::line(&format!("would: delete {name} in {}", cache.dir().display()))?;
        return Ok(Outcome::Done);
    }
    if !force {
        return Err(Failure::new(
            Code::Conflict,
            format!("without a center nobody knows which machines use image '{name}'"),
        )
        .hint("remove it all the same with --local --force, or start a center with: godwit up"));
    }
    cache.remove(name).map_err(|e| local_fault(&e, name))?;
    out::action(format, &format!("{name}   deleted"), name.as_str(), &json!({ "name": name }))?;
    Ok(Outcome::Done)
}

/// What is wrong with an image of this machine, and what to do about it.
fn local_fault(e: &ImageError, name: &Name) -> Fault {
    let f = Fault::of(e);
    match e {
        ImageError::NotBuilt { .. } if Recipe::get(name).is_ok() => {
            f.hint(format!("build it with: godwit image build {name}"))
        }
        ImageError::NotBuilt { .. } => Fault::not_found(format!("no image and no recipe '{name}'"))
            .hint("see the images with: godwit image list"),
        _ => f,
    }
}

fn open(dir: Option<PathBuf>) -> Result<ImageCache> {
    let dir = or_env(dir.as_ref(), "GODWIT_IMAGES");
    ImageCache::open(dir.unwrap_or_else(|| godwit_image::DEFAULT_CACHE.into()))
        .map_err(|e| Fault::of(&e).into())
}

fn local(cache: &ImageCache) -> Result<Vec<Held>> {
    let images = images_of(cache)?;
    let mut all: Vec<_> = images.into_iter().map(|image| Held { site: None, image }).collect();
    all.sort_by(|a, b| a.image.name.cmp(&b.image.name));
    Ok(all)
}

async fn build(
    cache: &ImageCache,
    names: &[Name],
    again: bool,
    how: &Change,
    format: Format,
) -> Result {
    if how.no_wait || how.timeout.is_some() {
        return Err(Failure::usage("a build on this machine is not an operation of a center")
            .hint("leave --no-wait and --timeout out, or start a center with: godwit up"));
    }
    let mut interrupt = Interrupt::listen()?;
    let mut built = Vec::new();
    for name in names {
        // Known before anything is fetched.
        Recipe::get(name).map_err(|e| Fault::of(&e))?;
        if how.dry_run {
            out::notice(&format!("would: build {name} in {}", cache.dir().display()));
            continue;
        }
        let bar = if out::shows_progress() {
            ProgressBar::new(1000).with_style(style("{prefix:12} {bar:24} {msg}"))
        } else {
            ProgressBar::hidden()
        };
        let shown = bar.clone();
        let last = std::sync::Mutex::new(None);
        let progress = move |p: godwit_image::Progress| {
            shown.set_prefix(p.stage.as_str());
            shown.set_position(p.fraction.map_or(0, |f| (f64::from(f) * 1000.0) as u64));
            shown.set_message(out::plain(&p.note));
            // Without a terminal, each stage is told once.
            if shown.is_hidden()
                && let Ok(mut l) = last.lock()
                && l.replace(p.stage) != Some(p.stage)
            {
                out::notice(&format!("{}: {}", p.stage.as_str(), out::plain(&p.note)));
            }
        };
        let image = tokio::select! {
            done = async {
                if again { cache.rebuild(name, progress).await } else { cache.build(name, progress).await }
            } => done.map_err(|e| Fault::of(&e))?,
            () = interrupt.pressed() => {
                return Err(Fault::cancelled().into());
            }
        };
        bar.finish_and_clear();
        built.push(held(&image));
    }
    if !how.dry_run {
        out::list(format, &built)?;
    }
    Ok(Outcome::Done)
}

async fn inspect(cache: &ImageCache, name: &Name, format: Format) -> Result {
    let image = cache.get(name).map_err(|e| local_fault(&e, name))?;
    let checked = image.clone();
    tokio::task::spawn_blocking(move || checked.verify())
        .await
        .map_err(|e| Failure::internal(e.to_string()))?
        .map_err(|e| Fault::of(&e))?;
    match format {
        Format::Json | Format::Yaml => {
            let mut all =
                serde_json::to_value(held(&image)).map_err(|e| Failure::internal(e.to_string()))?;
            all["directory"] = json!(image.dir());
            all["kernel"] = json!(image.kernel);
            all["initrd"] = json!(image.initrd);
            all["disk"] = json!(image.disk);
            all["cmdline"] = json!(image.cmdline);
            all["agent"] = json!(image.agent);
            out::value(format, &all)?;
        }
        Format::Name => out::line(name.as_str())?,
        Format::Table | Format::Wide => {
            out::one(format, &held(&image))?;
            out::line(&format!("dir       {}", image.dir().display()))?;
            out::line(&format!("cmdline   {}", out::plain(&image.cmdline)))?;
            out::notice("every file matches its hash");
        }
    }
    Ok(Outcome::Done)
}
