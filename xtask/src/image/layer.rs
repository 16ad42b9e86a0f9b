//! A layer: a compressed tar archive whose bytes depend only on its files and one time.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// Files of a layer by path, without the leading slash. Folders of files are added automatically.
#[derive(Debug, Default)]
pub(crate) struct Files(BTreeMap<PathBuf, Entry>);

#[derive(Debug)]
enum Entry {
    Folder,
    File { mode: u32, content: Vec<u8> },
}

impl Files {
    /// Adds a file with the given content.
    pub(crate) fn text(&mut self, path: impl AsRef<Path>, content: impl Into<Vec<u8>>) {
        self.put(path.as_ref(), Entry::File { mode: 0o644, content: content.into() });
    }

    /// Adds a copy of a file. Only the permission to execute it is kept.
    pub(crate) fn copy(&mut self, path: impl AsRef<Path>, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        let executable = fs::metadata(from)?.permissions().mode() & 0o111 != 0;
        self.put(path.as_ref(), Entry::File { mode: if executable { 0o755 } else { 0o644 }, content });
        Ok(())
    }

    fn put(&mut self, path: &Path, entry: Entry) {
        let path = path.strip_prefix("/").unwrap_or(path);
        for folder in path.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()) {
            self.0.entry(folder.to_owned()).or_insert(Entry::Folder);
        }
        self.0.insert(path.to_owned(), entry);
    }

    /// Writes the files into a folder.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        for (path, entry) in &self.0 {
            let path = folder.join(path);
            match entry {
                Entry::Folder => fs::create_dir_all(&path)?,
                Entry::File { mode, content } => {
                    fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
                }
            }
        }
        Ok(())
    }

    /// Returns a tar archive of the files, sorted by path. All entries have this time, and root as owner.
    pub(crate) fn tar(&self, time: u64) -> Result<Vec<u8>> {
        let mut archive = Builder::new(Vec::new());
        // The map is sorted, so a folder comes before its contents.
        for (path, entry) in &self.0 {
            match entry {
                Entry::Folder => append(&mut archive, &path.join(""), EntryType::Directory, 0o755, time, &[])?,
                Entry::File { mode, content } => append(&mut archive, path, EntryType::Regular, *mode, time, content)?,
            }
        }
        Ok(archive.into_inner()?)
    }
}

fn append(
    archive: &mut Builder<Vec<u8>>,
    path: &Path,
    kind: EntryType,
    mode: u32,
    time: u64,
    content: &[u8],
) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(time);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content).with_context(|| format!("archive {}", path.display()))
}

/// A compressed layer.
pub(crate) struct Layer {
    /// Text for the image's history.
    pub(crate) title: String,
    /// The gzip stream.
    pub(crate) blob: Vec<u8>,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: String,
}

impl Layer {
    /// Packs files into a layer. `time` is in seconds since 1970.
    pub(crate) fn pack(title: &str, files: &Files, time: u64) -> Result<Self> {
        let tar = files.tar(time)?;
        Ok(Self { title: title.to_owned(), blob: compress(&tar)?, diff_id: digest(&tar) })
    }

    /// Returns the compressed size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.blob.len() as u64
    }
}

/// Compresses with a header that contains neither time, name nor operating system.
fn compress(bytes: &[u8]) -> Result<Vec<u8>> {
    const UNKNOWN_SYSTEM: u8 = 255;
    let builder = GzBuilder::new().mtime(0).operating_system(UNKNOWN_SYSTEM);
    let mut encoder = builder.write(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// Returns the digest of a blob, such as `sha256:12ab…`.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Files {
        let mut files = Files::default();
        for name in names {
            files.text(name, format!("content of {name}"));
        }
        files
    }

    #[test]
    fn equal_files_give_equal_bytes_in_any_order() {
        let one = Layer::pack("x", &files(&["etc/passwd", "a", "usr/lib/b"]), 1_700_000_000).expect("packed");
        let other = Layer::pack("x", &files(&["usr/lib/b", "etc/passwd", "a"]), 1_700_000_000).expect("packed");
        assert_eq!(one.blob, other.blob);
        assert_eq!(one.diff_id, other.diff_id);
        let changed = Layer::pack("x", &files(&["usr/lib/b", "etc/passwd", "c"]), 1_700_000_000).expect("packed");
        assert_ne!(one.diff_id, changed.diff_id);
    }

    #[test]
    fn copies_do_not_depend_on_time_and_owner_permissions_of_the_original() {
        let folder = tempfile::tempdir().expect("a folder");
        let pack = |name: &str, mode: u32| {
            let path = folder.path().join(name);
            fs::write(&path, "program").expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("permissions");
            let mut files = Files::default();
            files.copy("program", &path).expect("copied");
            Layer::pack("x", &files, 1).expect("packed").blob
        };
        assert_eq!(pack("a", 0o700), pack("b", 0o755));
        assert_ne!(pack("a", 0o700), pack("b", 0o600));
    }

    #[test]
    fn entries_are_sorted_and_belong_to_root_with_one_time() {
        let tar = files(&["b/c/d", "a"]).tar(7).expect("packed");
        let mut archive = tar::Archive::new(tar.as_slice());
        let mut paths = Vec::new();
        for entry in archive.entries().expect("entries") {
            let entry = entry.expect("an entry");
            let header = entry.header();
            let owner = (header.uid().expect("user"), header.gid().expect("group"), header.mtime().expect("time"));
            assert_eq!(owner, (0, 0, 7));
            paths.push(entry.path().expect("a path").display().to_string());
        }
        assert_eq!(paths, ["a", "b/", "b/c/", "b/c/d"]);
    }

    #[test]
    fn compressed_stream_has_a_constant_header() {
        let stream = compress(b"text").expect("compressed");
        assert_eq!(stream[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 255]);
    }

    #[test]
    fn files_are_written_with_their_modes() {
        let folder = tempfile::tempdir().expect("a folder");
        files(&["etc/passwd"]).write(folder.path()).expect("written");
        let mode = fs::metadata(folder.path().join("etc/passwd")).expect("written").permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
    }
}
