//! The Debian system from which an image's programs, libraries and their packages are taken.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use raven_tests::qemu;

use super::foreign;
use crate::debian_kernel::output_of;

/// An architecture of images, by the name that Debian and container images use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    /// x86-64.
    Amd64,
    /// 64-bit Arm.
    Arm64,
}

impl Arch {
    /// Returns the name in image configurations and Debian packages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Returns the compiler's target triple.
    pub(crate) fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Reports whether this machine executes programs of the architecture.
    fn is_native(self) -> bool {
        self.triple().starts_with(std::env::consts::ARCH)
    }
}

/// A Debian package.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) arch: String,
}

/// A Debian system.
pub(crate) struct Machine {
    /// Architecture of its programs.
    pub(crate) arch: Arch,
    /// Folder that contains the system; `/` for this machine.
    root: PathBuf,
}

impl Machine {
    /// Returns a system of this architecture: this machine, or one whose packages are downloaded.
    pub(crate) fn prepare(arch: Arch) -> Result<Self> {
        if arch.is_native() {
            return Ok(Self { arch, root: PathBuf::from("/") });
        }
        let cannot = || format!("this machine cannot make images of {}", arch.name());
        foreign::check(arch.triple()).with_context(cannot)?;
        Ok(Self { arch, root: foreign::prepare(arch.name()).with_context(cannot)? })
    }

    /// Reports whether this machine itself is the system.
    pub(crate) fn is_native(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Returns the path on this machine of a file of the system.
    pub(crate) fn outside(&self, file: &Path) -> PathBuf {
        self.root.join(file.strip_prefix("/").unwrap_or(file))
    }

    /// Finds a program of the system.
    pub(crate) fn program(&self, name: &str) -> Result<PathBuf> {
        let folders = ["/usr/sbin", "/usr/bin"].map(PathBuf::from);
        let found = folders.iter().map(|folder| folder.join(name)).find(|path| self.outside(path).is_file());
        found.with_context(|| format!("{name} is not installed in {}; run `cargo xtask setup`", self.root.display()))
    }

    /// Returns the libraries that a program on this machine loads in the system, with the loader.
    pub(crate) fn libraries(&self, program: &Path) -> Result<BTreeSet<PathBuf>> {
        // For a static program ldd prints no library and exits with an error.
        let listed = self.lister().arg(program).env("LC_ALL", "C").output().context("list libraries")?;
        let listed = String::from_utf8_lossy(&listed.stdout);
        let missing = listed.lines().find(|line| line.contains("not found")).map(str::trim);
        ensure!(missing.is_none(), "libraries of {}: {}", program.display(), missing.unwrap_or_default());
        let inside =
            |path: PathBuf| path.strip_prefix(&self.root).map(|rest| Path::new("/").join(rest)).unwrap_or(path);
        Ok(qemu::libraries(&listed).into_iter().map(inside).collect())
    }

    /// Returns the command that lists a program's libraries: ldd, which asks the loader, or an emulator that runs the
    /// system's own loader.
    fn lister(&self) -> Command {
        if self.is_native() {
            return Command::new("ldd");
        }
        let mut emulator = Command::new("qemu-aarch64-static");
        emulator.arg("-L").arg(&self.root).arg(self.root.join("lib/ld-linux-aarch64.so.1")).arg("--list");
        emulator
    }

    /// Returns the package that contains a file.
    pub(crate) fn package(&self, file: &Path) -> Result<Package> {
        let owner = candidates(file).iter().find_map(|path| owner(&self.dpkg("-S", path.to_str()?).ok()?));
        let owner = owner.with_context(|| format!("no Debian package contains {}", file.display()))?;
        let format = "--showformat=${Package} ${Version} ${Architecture}";
        package(&output_of(self.query().args(["-W", format, &owner]))?)
    }

    /// Returns the record of a package in dpkg's database.
    pub(crate) fn record(&self, package: &Package) -> Result<String> {
        self.dpkg("-s", &format!("{}:{}", package.name, package.arch))
    }

    fn dpkg(&self, action: &str, argument: &str) -> Result<String> {
        output_of(self.query().args([action, argument]))
    }

    fn query(&self) -> Command {
        let mut query = Command::new("dpkg-query");
        query.arg("--admindir").arg(self.root.join("var/lib/dpkg")).env("LC_ALL", "C");
        query
    }
}

/// Returns the paths under which dpkg may list a file: `/lib` and `/usr/lib` are one folder, and packages name either.
fn candidates(file: &Path) -> [PathBuf; 2] {
    let other = match file.strip_prefix("/usr") {
        Ok(rest) => Path::new("/").join(rest),
        Err(_) => Path::new("/usr").join(file.strip_prefix("/").unwrap_or(file)),
    };
    [file.to_owned(), other]
}

/// Parses the output of `dpkg-query -S`: `libc6:amd64: /lib/x86_64-linux-gnu/libc.so.6`.
fn owner(output: &str) -> Option<String> {
    let line = output.lines().find(|line| !line.starts_with("diversion "))?;
    let (owners, _) = line.split_once(": ")?;
    Some(owners.split(", ").next()?.to_owned())
}

fn package(output: &str) -> Result<Package> {
    let mut words = output.split_whitespace().map(str::to_owned);
    let mut next = || words.next().with_context(|| format!("dpkg-query printed `{output}`"));
    Ok(Package { name: next()?, version: next()?, arch: next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_is_parsed_from_the_output_of_dpkg() {
        assert_eq!(owner("libc6:amd64: /lib/libc.so.6\n").as_deref(), Some("libc6:amd64"));
        assert_eq!(owner("a:amd64, b:amd64: /usr/share/x\n").as_deref(), Some("a:amd64"));
        assert_eq!(owner("diversion by dash from: /bin/sh\ndash: /bin/sh\n").as_deref(), Some("dash"));
        assert_eq!(owner(""), None);
    }

    #[test]
    fn files_are_looked_up_with_and_without_usr() {
        assert_eq!(candidates(Path::new("/lib/a")), ["/lib/a", "/usr/lib/a"].map(PathBuf::from));
        assert_eq!(candidates(Path::new("/usr/sbin/nft")), ["/usr/sbin/nft", "/sbin/nft"].map(PathBuf::from));
    }

    #[test]
    fn package_needs_name_version_and_architecture() {
        let expected = Package { name: "libc6".to_owned(), version: "2.36-9".to_owned(), arch: "amd64".to_owned() };
        assert_eq!(package("libc6 2.36-9 amd64").expect("a package"), expected);
        package("libc6 2.36-9").expect_err("no architecture");
    }
}
