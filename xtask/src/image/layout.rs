//! The archive of an image: an OCI image layout, and the description that `docker load` and `kind` read.
//!
//! Formats: OCI image specification 1.1 (image-layout.md, config.md, manifest.md), and `manifest.json` of `docker save`.
//! The keys of `serde_json`'s objects are in a fixed order, so equal inputs give equal bytes.

use std::collections::BTreeMap;

use anyhow::Result;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    layer::{Files, Layer, digest},
    machine::Arch,
};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What an image's configuration contains besides its layers.
pub(crate) struct Description<'a> {
    /// Name and tag, such as `ghcr.io/openyurtio/raven-agent:0.1.0`.
    pub(crate) reference: &'a str,
    /// Architecture of the programs.
    pub(crate) arch: Arch,
    /// Time of the image.
    pub(crate) created: Timestamp,
    /// User and group, such as `65532:65532`.
    pub(crate) user: &'a str,
    /// Path of the program in the image.
    pub(crate) entrypoint: String,
    /// Labels of the configuration and annotations of the manifest.
    pub(crate) labels: BTreeMap<String, String>,
}

/// An image in an archive.
pub(crate) struct Image {
    /// Digest of the manifest, by which a registry addresses the image.
    pub(crate) digest: String,
    /// The archive.
    pub(crate) tar: Vec<u8>,
}

/// Makes the archive of an image.
pub(crate) fn archive(image: &Description<'_>, layers: &[Layer]) -> Result<Image> {
    let mut files = Files::default();
    let config = bytes(&config(image, layers))?;
    let manifest = bytes(&manifest(image, layers, &config))?;
    let blobs = layers.iter().map(|layer| layer.blob.as_slice()).chain([config.as_slice(), manifest.as_slice()]);
    blobs.for_each(|blob| files.text(path(blob), blob));
    files.text("oci-layout", bytes(&json!({ "imageLayoutVersion": "1.0.0" }))?);
    files.text("index.json", bytes(&index(image, &manifest))?);
    files.text("manifest.json", bytes(&docker(image, layers, &config))?);
    Ok(Image { digest: digest(&manifest), tar: files.tar(image.created.as_second().unsigned_abs())? })
}

fn bytes(value: &Value) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(value)?)
}

/// Returns the path of a blob in the layout.
fn path(blob: &[u8]) -> String {
    format!("blobs/{}", digest(blob).replace(':', "/"))
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() })
}

fn config(image: &Description<'_>, layers: &[Layer]) -> Value {
    let created = image.created.to_string();
    let step =
        |layer: &Layer| json!({ "created": created, "created_by": format!("cargo xtask image: {}", layer.title) });
    json!({
        "architecture": image.arch.name(),
        "os": "linux",
        "created": created,
        "config": {
            "User": image.user,
            "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "Entrypoint": [image.entrypoint],
            "WorkingDir": "/",
            "Labels": image.labels,
        },
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>() },
        "history": layers.iter().map(step).collect::<Vec<_>>(),
    })
}

fn manifest(image: &Description<'_>, layers: &[Layer], config: &[u8]) -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, config),
        "layers": layers.iter().map(|layer| descriptor(LAYER, &layer.blob)).collect::<Vec<_>>(),
        "annotations": image.labels,
    })
}

/// Returns the index. Its annotations name the image for containerd (full reference) and skopeo (tag).
fn index(image: &Description<'_>, manifest: &[u8]) -> Value {
    let tag = image.reference.rsplit(':').next().unwrap_or_default();
    let mut entry = descriptor(MANIFEST, manifest);
    entry["platform"] = json!({ "architecture": image.arch.name(), "os": "linux" });
    entry["annotations"] =
        json!({ "io.containerd.image.name": image.reference, "org.opencontainers.image.ref.name": tag });
    json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [entry] })
}

fn docker(image: &Description<'_>, layers: &[Layer], config: &[u8]) -> Value {
    let layers: Vec<String> = layers.iter().map(|layer| path(&layer.blob)).collect();
    json!([{ "Config": path(config), "RepoTags": [image.reference], "Layers": layers }])
}

#[cfg(test)]
mod tests;
