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
    // In the same folder, because a rename is atomic only within one file system. The name is fixed, so that the file of
    // an interrupted write is replaced by the next one. The mode is 0600.
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let name = temporary.file_name().unwrap_or_default();
    let mut file = tempfile::Builder::new().prefix(name).rand_bytes(0).tempfile_in(folder)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
