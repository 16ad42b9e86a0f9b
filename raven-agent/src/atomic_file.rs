//! Files that are replaced as a whole: a crash or power loss leaves the old content or the new one.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

/// Replaces the file at `path`, readable by root only; creates its folder if needed.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    // In the same folder, because a rename is atomic only within one file system. The mode is 0600.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
