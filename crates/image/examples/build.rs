//! Builds one image: `cargo run -p godwit-image --example build -- tiny [CACHE]`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for the command line")]

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use godwit_image::{DEFAULT_CACHE, ImageCache};
use godwit_types::{Name, human_bytes};

#[tokio::main]
async fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(name) = args.next() else {
        eprintln!("usage: build NAME [CACHE]");
        return ExitCode::from(2);
    };
    let cache = args.next().or(std::env::var("GODWIT_IMAGES").ok()).unwrap_or(DEFAULT_CACHE.into());
    match build(&name, &cache).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("error: {error}");
            let mut source = error.source();
            while let Some(e) = source {
                eprint!(": {e}");
                source = e.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

async fn build(name: &str, cache: &str) -> Result<(), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let last = Mutex::new(String::new());
    let image = ImageCache::open(cache)?
        .build(&Name::new(name)?, |p| {
            let line = format!("{:<12}{}", p.stage.as_str(), p.note);
            let mut last = last.lock().unwrap_or_else(|e| e.into_inner());
            if *last != line {
                eprintln!("{:7.2} s  {line}", start.elapsed().as_secs_f32());
                *last = line;
            }
        })
        .await?;
    image.verify()?;
    println!("{}  {}  {}", image.name, image.hash.short(), human_bytes(image.stored_bytes()?));
    Ok(())
}
