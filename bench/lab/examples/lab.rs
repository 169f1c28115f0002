//! Boots a machine and runs lines of shell in it, one after the other; for work by hand.
//!
//! `lab CPUS PROGRAM... -- LINE...`: the programs are put into the guest with their libraries.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use godwit_lab::{Error, Initramfs, Kernel, Machine, Spec};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let cpus = args.next().ok_or("lab CPUS PROGRAM... -- LINE...")?.parse()?;
    let mut initramfs = Initramfs::new();
    for program in args.by_ref().take_while(|arg| arg != "--") {
        initramfs = initramfs.program(program)?;
    }
    let mut machine = Machine::boot(&Kernel::find()?, &initramfs, &Spec::new("lab", cpus, 1024))?;
    let mut out = io::stdout();
    writeln!(out, "# booted in {:.1} s", machine.boot_time().as_secs_f64())?;
    for line in args {
        writeln!(out, "$ {line}")?;
        let started = Instant::now();
        match machine.run(&line, Duration::from_secs(300)) {
            Ok(answer) => {
                let took = started.elapsed().as_secs_f64();
                writeln!(out, "{}# {} after {took:.1} s", answer.output, answer.status)?;
            }
            Err(error @ (Error::Late { .. } | Error::Ended { .. })) => {
                writeln!(out, "{}", machine.console().join("\n"))?;
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
