//! `cargo xtask image`: makes container images of raven-agent and raven-controller without a container engine.
//!
//! An image is an archive that contains an OCI image layout and the description that `docker load` reads, with an SBOM
//! beside it. It has no base image: it contains the program, what the program executes, and their libraries from this
//! machine's Debian packages. The same commit, compiler and packages give the same bytes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets::NOTHING};

use crate::{
    progress,
    setup::{self, Need},
    target_dir,
};

mod commit;
mod compile;
mod foreign;
mod layer;
mod layout;
mod machine;
mod rootfs;
mod sbom;

use commit::Commit;
use layer::Layer;
use layout::Description;
use machine::{Arch, Machine};

/// Arguments of `image`.
#[derive(clap::Args)]
pub(crate) struct Image {
    /// Architecture of the images.
    #[arg(long, value_enum, default_value_t = Arch::Amd64)]
    arch: Arch,
    /// Folder for archives, SBOMs and root file systems [default: target/image].
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Tag of the images.
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
}

/// A program of which an image is made.
pub(crate) struct Program {
    /// Name of the crate, of the program and of the image.
    pub(crate) name: &'static str,
    /// One sentence for the image's labels.
    description: &'static str,
    /// User and group in the container.
    user: &'static str,
    /// Programs that it executes, by name and path in the image.
    executes: &'static [(&'static str, &'static str)],
    /// Crates whose code it contains without linking them.
    pub(crate) embeds: &'static [Embedded],
    /// Largest allowed size of the compressed layers in bytes.
    limit: u64,
}

/// A crate whose compiled form is part of a program's data.
pub(crate) struct Embedded {
    /// Name of the crate.
    pub(crate) name: &'static str,
    /// Target triple for which it is compiled.
    pub(crate) target: &'static str,
}

const PROGRAMS: [Program; 2] = [
    Program {
        name: "raven-agent",
        description: "Raven's agent: connects the pods of a node to other pools, and kubelets to the API server.",
        user: "0:0",
        executes: &[("nft", "usr/sbin/nft")],
        embeds: &[Embedded { name: "raven-ebpf", target: crate::toolchain::TARGET }],
        limit: 25_000_000,
    },
    Program {
        name: "raven-controller",
        description: "Raven's controller: elects gateway nodes and publishes the pools.",
        user: "65532:65532",
        executes: &[],
        embeds: &[],
        limit: 15_000_000,
    },
];

/// Registry and organisation of the images, as in deploy/.
const REGISTRY: &str = "ghcr.io/openyurtio";

/// Returns the folder of images for which no other one was named.
pub(crate) fn folder() -> PathBuf {
    target_dir().join("image")
}

/// Makes the images that deploy/ names, for tests on this machine.
pub(crate) fn of_this_version() -> Result<()> {
    Image { arch: Arch::Amd64, output: None, tag: env!("CARGO_PKG_VERSION").to_owned() }.run()
}

/// A finished image.
struct Made {
    name: &'static str,
    reference: String,
    digest: String,
    /// Size of the compressed layers in bytes.
    size: u64,
    archive: PathBuf,
    sbom: PathBuf,
}

impl Image {
    /// Makes the images and prints a table of them. Fails if an image exceeds its limit.
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(&[Need::Build, Need::Ebpf, Need::Image])?;
        let commit = Commit::read()?;
        let machine = Machine::prepare(self.arch)?;
        let names: Vec<&str> = PROGRAMS.iter().map(|program| program.name).collect();
        let programs = compile::programs(&names, &machine)?;
        let made: Vec<Made> = PROGRAMS
            .iter()
            .map(|program| self.make(program, &programs, &commit, &machine).with_context(|| program.name))
            .collect::<Result<_>>()?;
        println!("{}", table(&made));
        check_sizes(&made)
    }

    fn make(&self, program: &Program, programs: &Path, commit: &Commit, machine: &Machine) -> Result<Made> {
        progress::step(&format!("making the image of {}", program.name));
        let files = rootfs::collect(program, &programs.join(program.name), machine)?;
        // The system's files have a constant time: their layer is the same in every version of Raven until a package
        // changes, so nodes that have it do not download it again.
        let layers = [
            Layer::pack("files of Debian packages", &files.system, 0)?,
            Layer::pack(program.name, &files.program, commit.time.as_second().unsigned_abs())?,
        ];
        let reference = format!("{REGISTRY}/{}:{}", program.name, self.tag);
        let description = Description {
            reference: &reference,
            arch: self.arch,
            created: commit.time,
            user: program.user,
            entrypoint: format!("/{}", program.name),
            labels: commit.labels(program),
        };
        let image = layout::archive(&description, &layers)?;
        let sbom = sbom::Sbom { program, reference: &reference, digest: &image.digest, commit, machine };
        let sbom = sbom.document(&files.packages)?;
        let made = Made {
            name: program.name,
            digest: image.digest,
            size: layers.iter().map(Layer::size).sum(),
            archive: self.path(program, "tar"),
            sbom: self.path(program, "cdx.json"),
            reference,
        };
        files.write(&self.folder().join(self.arch.name()).join(program.name).join("rootfs"))?;
        write(&made.archive, &image.tar)?;
        write(&made.sbom, &sbom)?;
        Ok(made)
    }

    fn folder(&self) -> PathBuf {
        self.output.clone().unwrap_or_else(folder)
    }

    /// Returns the path of an output file, such as `raven-agent-0.1.0-amd64.tar`.
    fn path(&self, program: &Program, extension: &str) -> PathBuf {
        self.folder().join(format!("{}-{}-{}.{extension}", program.name, self.tag, self.arch.name()))
    }
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::create_dir_all(path.parent().context("the output file has no folder")?)?;
    fs::write(path, content).with_context(|| format!("write {}", path.display()))
}

fn table(made: &[Made]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["NAME", "REFERENCE", "DIGEST", "COMPRESSED", "ARCHIVE", "SBOM"]);
    for image in made {
        let size = format!("{:.1} MB", image.size as f64 / 1e6);
        let (archive, sbom) = (image.archive.display().to_string(), image.sbom.display().to_string());
        table.add_row([image.name, &image.reference, &image.digest, &size, &archive, &sbom]);
    }
    table
}

fn check_sizes(made: &[Made]) -> Result<()> {
    for (image, program) in made.iter().zip(&PROGRAMS) {
        let (size, limit) = (image.size, program.limit);
        ensure!(size <= limit, "image {}: {size} bytes compressed exceed the limit of {limit} bytes", image.name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_above_its_limit_is_an_error() {
        let made = |size| Made {
            name: PROGRAMS[0].name,
            reference: String::new(),
            digest: String::new(),
            size,
            archive: PathBuf::new(),
            sbom: PathBuf::new(),
        };
        check_sizes(&[made(PROGRAMS[0].limit)]).expect("at the limit");
        check_sizes(&[made(PROGRAMS[0].limit + 1)]).expect_err("above the limit");
    }

    #[test]
    fn references_are_those_of_the_manifests() {
        let deploy = include_str!("../../deploy/kustomization.yaml");
        let cleanup = include_str!("../../deploy/cleanup/kustomization.yaml");
        for (file, name) in [(deploy, PROGRAMS[0].name), (deploy, PROGRAMS[1].name), (cleanup, PROGRAMS[0].name)] {
            let lines = format!("name: {REGISTRY}/{name}\n    newTag: {}\n", env!("CARGO_PKG_VERSION"));
            assert!(file.contains(&lines), "a kustomization lacks `{lines}`");
        }
    }
}
