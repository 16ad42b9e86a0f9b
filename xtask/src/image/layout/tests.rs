//! The archive is read back as tools read it.

use std::io::Read;

use super::*;

type Archive = BTreeMap<String, Vec<u8>>;

const REFERENCE: &str = "ghcr.io/openyurtio/raven-agent:0.1.0";

fn image(system: &str) -> Image {
    let (mut first, mut second) = (Files::default(), Files::default());
    first.text("etc/passwd", system);
    second.text("raven-agent", "program");
    let layers =
        [("system", first), ("program", second)].map(|(title, files)| Layer::pack(title, &files, 7).expect("packed"));
    let labels =
        ["title", "version", "licenses"].map(|key| (format!("org.opencontainers.image.{key}"), key.to_owned()));
    let description = Description {
        reference: REFERENCE,
        arch: Arch::Amd64,
        created: Timestamp::from_second(1_700_000_000).expect("a time"),
        user: "65532:65532",
        entrypoint: "/raven-agent".to_owned(),
        labels: labels.into(),
    };
    archive(&description, &layers).expect("an archive")
}

fn unpack(image: &Image) -> Archive {
    let mut archive = tar::Archive::new(image.tar.as_slice());
    let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
        let mut entry = entry.expect("an entry");
        let mut content = Vec::new();
        entry.read_to_end(&mut content).expect("read");
        (entry.path().expect("a path").display().to_string(), content)
    };
    archive.entries().expect("entries").map(read).collect()
}

fn parse(archive: &Archive, path: &str) -> Value {
    serde_json::from_slice(archive.get(path).unwrap_or_else(|| panic!("{path} is missing"))).expect("JSON")
}

/// Returns the blob of a descriptor, after checking its size and digest.
fn blob<'a>(archive: &'a Archive, descriptor: &Value) -> &'a [u8] {
    let name = descriptor["digest"].as_str().expect("a digest");
    let content = archive.get(&format!("blobs/{}", name.replace(':', "/"))).expect("the blob exists");
    assert_eq!(digest(content), name);
    assert_eq!(descriptor["size"], content.len());
    content
}

fn json_blob(archive: &Archive, descriptor: &Value) -> Value {
    serde_json::from_slice(blob(archive, descriptor)).expect("JSON")
}

fn decompress(blob: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    flate2::read::GzDecoder::new(blob).read_to_end(&mut content).expect("decompressed");
    content
}

#[test]
fn equal_inputs_give_equal_archives() {
    let (one, other) = (image("root"), image("root"));
    assert_eq!((one.tar, &one.digest), (other.tar, &other.digest));
    assert_ne!(one.digest, image("other").digest);
}

#[test]
fn digests_and_sizes_match_from_index_to_layers() {
    let image = image("root");
    let archive = unpack(&image);
    assert_eq!(parse(&archive, "oci-layout")["imageLayoutVersion"], "1.0.0");
    let entry = &parse(&archive, "index.json")["manifests"][0];
    assert_eq!(entry["digest"], image.digest.as_str());
    let manifest = json_blob(&archive, entry);
    let config = json_blob(&archive, &manifest["config"]);
    let layers = manifest["layers"].as_array().expect("layers");
    let diff_ids = config["rootfs"]["diff_ids"].as_array().expect("diff_ids");
    assert_eq!((layers.len(), diff_ids.len()), (2, 2));
    for (layer, diff_id) in layers.iter().zip(diff_ids) {
        assert_eq!(digest(&decompress(blob(&archive, layer))), diff_id.as_str().expect("a digest"));
    }
    assert_eq!(manifest["annotations"], config["config"]["Labels"]);
}

#[test]
fn names_are_those_that_containerd_and_skopeo_read() {
    let annotations = &parse(&unpack(&image("root")), "index.json")["manifests"][0]["annotations"];
    assert_eq!(annotations["io.containerd.image.name"], REFERENCE);
    assert_eq!(annotations["org.opencontainers.image.ref.name"], "0.1.0");
}

#[test]
fn docker_description_names_the_same_blobs() {
    let archive = unpack(&image("root"));
    let docker = &parse(&archive, "manifest.json")[0];
    assert_eq!(docker["RepoTags"], json!([REFERENCE]));
    let manifest = json_blob(&archive, &parse(&archive, "index.json")["manifests"][0]);
    let path =
        |descriptor: &Value| format!("blobs/{}", descriptor["digest"].as_str().expect("a digest").replace(':', "/"));
    assert_eq!(docker["Config"], path(&manifest["config"]));
    let layers: Vec<String> = manifest["layers"].as_array().expect("layers").iter().map(path).collect();
    assert_eq!(docker["Layers"], json!(layers));
}
