//! The root file system of an image: a program, what it executes, their libraries, and nothing else that runs.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{
    Program,
    layer::Files,
    machine::{Machine, Package},
};
use crate::workspace;

/// Accounts. 65532 is the user that images without a distribution use by convention.
const PASSWD: &str = "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nnonroot:x:65532:\n";
/// Name resolution of glibc: the hosts file before DNS.
const NSSWITCH: &str = "passwd: files\ngroup: files\nhosts: files dns\n";

/// Files of an image.
pub(crate) struct Rootfs {
    /// Files of Debian packages, and accounts.
    pub(crate) system: Files,
    /// Raven's program and its licence.
    pub(crate) program: Files,
    /// Packages of which `system` contains files.
    pub(crate) packages: BTreeSet<Package>,
}

/// Collects the files of a program's image. `executable` is the compiled program.
pub(crate) fn collect(program: &Program, executable: &Path, machine: &Machine) -> Result<Rootfs> {
    let (mut system, mut packages) = (accounts(), BTreeSet::new());
    let mut libraries = machine.libraries(executable)?;
    for (name, path) in program.executes {
        let found = machine.program(name)?;
        libraries.extend(machine.libraries(&machine.outside(&found))?);
        packages.insert(machine.package(&found)?);
        system.copy(path, &machine.outside(&found))?;
    }
    for library in libraries {
        packages.insert(machine.package(&library)?);
        system.copy(&library, &machine.outside(&library))?;
    }
    describe(&mut system, &packages, machine)?;
    Ok(Rootfs { system, program: own(program, executable)?, packages })
}

fn accounts() -> Files {
    let mut files = Files::default();
    files.text("etc/passwd", PASSWD);
    files.text("etc/group", GROUP);
    files.text("etc/nsswitch.conf", NSSWITCH);
    files
}

/// Adds the packages' licences, and their records where vulnerability scanners read them in images without dpkg.
fn describe(files: &mut Files, packages: &BTreeSet<Package>, machine: &Machine) -> Result<()> {
    for package in packages {
        let copyright = PathBuf::from("/usr/share/doc").join(&package.name).join("copyright");
        files.copy(&copyright, &machine.outside(&copyright))?;
        files.text(Path::new("var/lib/dpkg/status.d").join(&package.name), machine.record(package)?);
    }
    ["/etc/os-release", "/etc/debian_version"]
        .iter()
        .try_for_each(|file| files.copy(file, &machine.outside(Path::new(file))))
}

fn own(program: &Program, executable: &Path) -> Result<Files> {
    let mut files = Files::default();
    files.copy(program.name, executable)?;
    for name in ["LICENSE", "NOTICE"] {
        files.copy(Path::new("usr/share/doc").join(program.name).join(name), &workspace().join(name))?;
    }
    Ok(files)
}

impl Rootfs {
    /// Writes all files into a folder, which is emptied first.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("empty {}", folder.display()))?;
        }
        self.system.write(folder)?;
        self.program.write(folder)
    }
}
