//! The node's WireGuard key: created on the node, readable by root only, kept across restarts, never sent anywhere.
//! Also the cluster's preshared key, if it has one.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use wireguard_control::Key;

use super::Error;
use crate::{atomic_file, topology::PresharedKey};

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    move |reason| Error::Key { path: path.display().to_string(), reason }
}

/// The private key in `path`, which is created if it does not exist. A file that contains no key is
/// renamed, not overwritten.
pub fn load_or_create(path: &Path) -> Result<Key, Error> {
    match fs::read_to_string(path) {
        Ok(text) => {
            if let Ok(key) = Key::from_base64(text.trim()) {
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed(path))?;
                return Ok(key);
            }
            let renamed = path.with_extension("unreadable");
            fs::rename(path, &renamed).map_err(failed(path))?;
            tracing::warn!(path = %path.display(), renamed = %renamed.display(), "the key file contains no key; renamed it and created a new key");
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(path)(e)),
    }
    let key = Key::generate_private();
    atomic_file::write(path, format!("{}\n", key.to_base64()).as_bytes()).map_err(failed(path))?;
    Ok(key)
}

/// The preshared key in `path`; `None` if the file is missing or empty.
pub fn load_preshared(path: &Path) -> Result<Option<PresharedKey>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(PresharedKey::from_bytes(&bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed(path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_is_kept_and_readable_by_root_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state/wireguard.key");
        let first = load_or_create(&path).expect("a key");
        let mode = fs::metadata(&path).expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("permissions set");
        assert_eq!(load_or_create(&path).expect("the same key").to_base64(), first.to_base64());
        assert_eq!(fs::metadata(&path).expect("the file").permissions().mode() & 0o777, 0o600, "permissions restored");
    }

    #[test]
    fn file_without_a_key_is_renamed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("wireguard.key");
        fs::write(&path, "not a key").expect("written");
        load_or_create(&path).expect("a new key");
        assert_eq!(fs::read_to_string(folder.path().join("wireguard.unreadable")).expect("kept"), "not a key");
    }
}
