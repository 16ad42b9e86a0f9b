//! A Debian system of another architecture: packages that are downloaded and unpacked into a folder.
//!
//! Their maintainer scripts cannot run here, so dpkg's database of the folder is written from the packages' own lists.
//! This machine's package lists and packages are not changed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{debian_kernel::output_of, progress, setup, target_dir, workspace};

/// Packages that the images contain; apt adds their dependencies.
const PACKAGES: [&str; 4] = ["nftables", "libc6", "libgcc-s1", "base-files"];

/// A program that is needed, and the command that installs it.
const PROGRAMS: [(&str, &str); 2] = [
    ("aarch64-linux-gnu-gcc", "apt-get install --no-install-recommends gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
    ("qemu-aarch64-static", "apt-get install --no-install-recommends qemu-user-static"),
];

/// Checks that programs for `triple` can be compiled and their libraries listed. The error names what is missing.
pub(crate) fn check(triple: &str) -> Result<()> {
    for (program, remedy) in PROGRAMS {
        ensure!(setup::on_path(program).is_some(), "{program} is missing; run `{remedy}`");
    }
    let library = output_of(
        Command::new("rustc").args(["--print", "target-libdir", "--target", triple]).current_dir(workspace()),
    )?;
    let found = Path::new(library.trim()).is_dir();
    ensure!(found, "the compiler has no standard library for {triple}; run `rustup target add {triple}`");
    Ok(())
}

/// Returns the folder of an unpacked Debian system, which is downloaded once. Delete the folder to get newer packages.
pub(crate) fn prepare(arch: &str) -> Result<PathBuf> {
    let root = std::path::absolute(target_dir())?.join(format!("debian-{arch}"));
    if root.is_dir() {
        return Ok(root);
    }
    progress::step(&format!("downloading Debian packages of {arch} into {} (once)", root.display()));
    let beside = root.with_extension("new");
    let _ = fs::remove_dir_all(&beside);
    let result = unpack(&download(&beside.join("apt"), arch)?, &beside.join("root"));
    result.and_then(|()| Ok(fs::rename(beside.join("root"), &root)?))?;
    fs::remove_dir_all(&beside)?;
    Ok(root)
}

/// Downloads packages with their dependencies, with separate lists and an empty package database.
fn download(folder: &Path, arch: &str) -> Result<Vec<PathBuf>> {
    for part in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(folder.join(part))?;
    }
    fs::write(folder.join("status"), "")?;
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        let place = |key: &str, name: &str| format!("-oDir::{key}={}", folder.join(name).display());
        command.args([format!("-oAPT::Architecture={arch}"), format!("-oAPT::Architectures={arch}")]);
        command.args([place("State::lists", "lists"), place("State::status", "status"), place("Cache", "cache")]);
        // apt's own user may have no access to the folder.
        command.args(["-oAPT::Sandbox::User=root", "-oDebug::NoLocking=true"]).args(arguments);
        output_of(&mut command)
    };
    apt(&["update", "-qq"])?;
    apt(&[&["install", "-qq", "-y", "--download-only", "--no-install-recommends"], &PACKAGES[..]].concat())?;
    let archives = folder.join("cache/archives");
    let paths = fs::read_dir(&archives)?.flatten().map(|entry| entry.path());
    let mut debs: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "deb")).collect();
    debs.sort();
    Ok(debs)
}

fn unpack(debs: &[PathBuf], root: &Path) -> Result<()> {
    let database = root.join("var/lib/dpkg");
    ["info", "updates"].iter().try_for_each(|folder| fs::create_dir_all(database.join(folder)))?;
    fs::write(database.join("info/format"), "1\n")?;
    let mut status = String::new();
    for deb in debs {
        output_of(Command::new("dpkg-deb").arg("-x").arg(deb).arg(root))?;
        let record = output_of(Command::new("dpkg-deb").arg("-f").arg(deb))?;
        let listed = output_of(Command::new("dpkg-deb").arg("-c").arg(deb))?;
        fs::write(database.join("info").join(list_name(&record)?), list(&listed))?;
        status.push_str(&installed(&record));
    }
    Ok(fs::write(database.join("status"), status)?)
}

/// Returns the name of the file that lists a package's paths. Packages that can be installed for several architectures
/// have the architecture in it.
fn list_name(record: &str) -> Result<String> {
    let field = |name: &str| record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let name = field("Package").context("a package has no name")?;
    match (field("Multi-Arch"), field("Architecture")) {
        (Some("same"), Some(arch)) => Ok(format!("{name}:{arch}.list")),
        _ => Ok(format!("{name}.list")),
    }
}

/// Converts the output of `dpkg-deb -c` (`-rw-r--r-- root/root 1 2023-01-01 00:00 ./usr/lib/x -> y`) into dpkg's list.
fn list(listed: &str) -> String {
    let path = |line: &str| {
        let path = line.split_whitespace().nth(5)?.strip_prefix('.')?.trim_end_matches('/');
        Some(if path.is_empty() { "/.\n".to_owned() } else { format!("{path}\n") })
    };
    listed.lines().filter_map(path).collect()
}

/// Returns the record with the state that dpkg writes for installed packages.
fn installed(record: &str) -> String {
    record.trim_end().replacen('\n', "\nStatus: install ok installed\n", 1) + "\n\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn database_is_written_as_dpkg_expects_it() {
        let record = "Package: libc6\nVersion: 2\nArchitecture: arm64\nMulti-Arch: same\n";
        assert_eq!(list_name(record).expect("a name"), "libc6:arm64.list");
        assert_eq!(list_name("Package: nftables\nArchitecture: arm64\n").expect("a name"), "nftables.list");
        assert!(installed(record).starts_with("Package: libc6\nStatus: install ok installed\nVersion: 2\n"));
        assert!(installed(record).ends_with("Multi-Arch: same\n\n"));
    }

    #[test]
    fn paths_are_parsed_from_the_output_of_dpkg_deb() {
        let listed = "drwxr-xr-x root/root 0 2023-01-01 00:00 ./\ndrwxr-xr-x root/root 0 2023-01-01 00:00 ./usr/\n\
                      lrwxrwxrwx root/root 0 2023-01-01 00:00 ./usr/x.so.1 -> x.so.1.2\n";
        assert_eq!(list(listed), "/.\n/usr\n/usr/x.so.1\n");
    }
}
