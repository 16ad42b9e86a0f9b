//! The node's WireGuard key: made here, readable by root alone, kept across restarts, never sent anywhere. And the cluster's preshared
//! key, where somebody made one.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use wireguard_control::Key;

use super::Error;
use crate::topology::PresharedKey;

/// The key in `path`; made if there is none. One that cannot be read as a key is put aside, not overwritten.
pub fn load_or_make(path: &Path) -> Result<Key, Error> {
    let failed = |reason: String| Error::Key { path: path.display().to_string(), reason };
    match fs::read_to_string(path) {
        Ok(text) => {
            if let Ok(key) = Key::from_base64(text.trim()) {
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|e| failed(e.to_string()))?;
                return Ok(key);
            }
            let aside = path.with_extension("unreadable");
            fs::rename(path, &aside).map_err(|e| failed(e.to_string()))?;
            tracing::warn!(path = %path.display(), aside = %aside.display(), "the key file holds no key; it was put aside and a new key made");
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e.to_string())),
    }
    let key = Key::generate_private();
    write(path, &key).map_err(|e| failed(e.to_string()))?;
    Ok(key)
}

/// The preshared key in `path`; none if there is no such file, or nothing in it.
pub fn load_preshared(path: &Path) -> Result<Option<PresharedKey>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(PresharedKey::from_bytes(&bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::Key { path: path.display().to_string(), reason: e.to_string() }),
    }
}

/// Written beside and renamed, so that a power cut leaves a whole key or none.
fn write(path: &Path, key: &Key) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = path.with_extension("new");
    let _ = fs::remove_file(&beside);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(format!("{}\n", key.to_base64()).as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_stays_and_only_root_may_read_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state/wireguard.key");
        let first = load_or_make(&path).expect("a key");
        let mode = fs::metadata(&path).expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("loosened");
        assert_eq!(load_or_make(&path).expect("the same key").to_base64(), first.to_base64());
        assert_eq!(fs::metadata(&path).expect("the file").permissions().mode() & 0o777, 0o600, "tightened again");
    }

    #[test]
    fn a_broken_key_file_is_put_aside() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("wireguard.key");
        fs::write(&path, "not a key").expect("written");
        load_or_make(&path).expect("a new key");
        assert_eq!(fs::read_to_string(folder.path().join("wireguard.unreadable")).expect("kept"), "not a key");
    }
}
