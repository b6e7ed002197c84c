//! Reading what others may have put there: regular files alone (a pipe or a device would be read for ever), none larger than its
//! kind can be, and in a run's folder nothing that a link points to. Errors are sentences without the path: callers have it as
//! context.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result};
use std::path::{Component, Path};

use bytes::Bytes;

/// Most bytes of a card, a configuration, or another file that a person writes.
pub const SETTINGS: u64 = 4 << 20;
/// Most bytes of a JSON file that a program writes: states, results, summaries, lists of classes.
pub const JSON: u64 = 64 << 20;
/// Most bytes of a file of JSON lines that is held as a whole.
pub const LINES: u64 = 256 << 20;
/// Most bytes of one line of such a file; longer ones are no rows of ours.
pub const LINE: u64 = 1 << 20;
/// Most bytes of a picture or a sound that a report shows.
pub const PICTURE: u64 = 32 << 20;

/// Whether a link at the end of the path is followed.
#[derive(Clone, Copy, PartialEq)]
enum Links {
    Followed,
    Refused,
}

fn refused(what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, what.to_owned())
}

/// Flags that keep an open from waiting for the other end of a pipe, and from following a link.
fn flags(options: &mut OpenOptions, links: Links) -> &mut OpenOptions {
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        let follow = if links == Links::Refused { libc::O_NOFOLLOW } else { 0 };
        options.custom_flags(libc::O_NONBLOCK | follow);
    }
    #[cfg(not(unix))]
    let _ = links;
    options
}

fn open_with(path: &Path, options: &mut OpenOptions, links: Links) -> Result<File> {
    if links == Links::Refused && path.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
        return Err(refused("is a symbolic link, expected a file of the folder's own"));
    }
    let file = flags(options, links).open(path)?;
    let kind = file.metadata()?.file_type();
    match (kind.is_file(), kind.is_dir()) {
        (true, _) => Ok(file),
        (_, true) => Err(Error::new(ErrorKind::IsADirectory, "is a folder, expected a file")),
        _ => Err(refused("is a pipe, a socket or a device, expected a regular file")),
    }
}

/// Opens a regular file. Links are followed.
///
/// Errors: those of the system; a folder, a pipe, a socket, a device.
pub fn open(path: &Path) -> Result<File> {
    open_with(path, OpenOptions::new().read(true), Links::Followed)
}

/// Opens `name` (with `/` between folders) inside a folder that a run writes to or a report shows.
///
/// Errors: besides those of [`open`], the file or a folder on the way from `folder` is a symbolic link.
pub fn open_inside(folder: &Path, name: &str) -> Result<File> {
    refuse_linked_folder(folder, name)?;
    open_with(&folder.join(name), OpenOptions::new().read(true), Links::Refused)
}

/// Opens `name` inside such a folder to write at its end; makes the file where it is missing. Errors as in [`open_inside`].
pub fn append_inside(folder: &Path, name: &str) -> Result<File> {
    refuse_linked_folder(folder, name)?;
    open_with(&folder.join(name), OpenOptions::new().create(true).append(true), Links::Refused)
}

/// [`append_inside`] of a file by its whole path.
pub fn append(path: &Path) -> Result<File> {
    open_with(path, OpenOptions::new().create(true).append(true), Links::Refused)
}

/// Opens to read and write in place, makes the file where it is missing. Errors as in [`open_inside`].
#[cfg(feature = "train")]
pub(crate) fn open_to_change(path: &Path) -> Result<File> {
    open_with(path, OpenOptions::new().read(true).write(true).create(true).truncate(false), Links::Refused)
}

/// Refuses a link among the folders between `folder` and its file `name`. (The folder itself may be reached through one.)
fn refuse_linked_folder(folder: &Path, name: &str) -> Result<()> {
    let name = Path::new(name);
    if !name.components().all(|c| matches!(c, Component::Normal(_))) {
        return Err(refused("is no name of a file inside the folder"));
    }
    let mut at = folder.to_owned();
    for part in name.parent().into_iter().flat_map(Path::components) {
        at.push(part);
        if at.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
            return Err(refused("lies in a folder that is a symbolic link, expected a folder of the run's own"));
        }
    }
    Ok(())
}

/// Makes a folder inside a run's folder, where it is missing.
///
/// Errors: there is a symbolic link in its place, through which the run would write elsewhere.
pub fn make_inside(folder: &Path, name: &str) -> Result<()> {
    let path = folder.join(name);
    if path.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
        return Err(refused(
            "is a symbolic link, expected a folder of the run's own: move what it points to into its place",
        ));
    }
    std::fs::create_dir_all(path)
}

/// The bytes that are left in a reader, where they are no more than `most`. What a file or an archive says of its own size is not
/// believed: reading stops there.
pub fn read_to_end(reader: impl Read, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(too_large(None, most)),
        false => Ok(bytes),
    }
}

fn too_large(size: Option<u64>, most: u64) -> Error {
    let has = size.map_or("has more".to_owned(), |n| format!("has {n} bytes"));
    Error::new(ErrorKind::FileTooLarge, format!("{has}, where a file of this kind has at most {most} bytes"))
}

fn whole(file: File, most: u64) -> Result<Vec<u8>> {
    match file.metadata()?.len() {
        size if size > most => Err(too_large(Some(size), most)),
        _ => read_to_end(file, most),
    }
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::InvalidData, "is no text (UTF-8)"))
}

/// The bytes of a regular file of at most `most` bytes. Errors: those of [`open`]; a larger one.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    whole(open(path)?, most)
}

/// [`read`] of a text. Errors: besides, what is no UTF-8.
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    text(read(path, most)?)
}

/// [`read`] of a file inside a run's folder. Errors: besides, those of [`open_inside`].
pub fn read_inside(folder: &Path, name: &str, most: u64) -> Result<Vec<u8>> {
    whole(open_inside(folder, name)?, most)
}

/// [`read_inside`] of a text.
pub fn read_text_inside(folder: &Path, name: &str, most: u64) -> Result<String> {
    text(read_inside(folder, name, most)?)
}

/// Gives each line of a text file, without its end, and whether it had one (the last may be cut short). Lines beyond [`LINE`] bytes and
/// what is no UTF-8 are given as empty ones: they are no rows of ours, and nothing of them is held.
pub fn for_lines(file: File, mut each: impl FnMut(&str, bool)) -> Result<()> {
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut reader).take(LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let mut whole = line.pop_if(|b| *b == b'\n').is_some();
        if !whole && line.len() as u64 == LINE {
            line.clear();
            whole = skip_line(&mut reader)?;
        }
        each(std::str::from_utf8(&line).unwrap_or_default(), whole);
    }
}

/// The rows of a file of JSON lines that a run writes; lines that are no such rows are passed over. Errors: those of [`open_inside`].
pub fn rows<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let file = open_with(path, OpenOptions::new().read(true), Links::Refused)?;
    let mut found = Vec::new();
    for_lines(file, |line, _| found.extend(serde_json::from_str::<T>(line).ok()))?;
    Ok(found)
}

/// Passes over the rest of a line; whether it ends with a line feed.
fn skip_line(reader: &mut impl BufRead) -> Result<bool> {
    loop {
        let part = reader.fill_buf()?;
        let end = part.iter().position(|b| *b == b'\n');
        let (taken, over) = (end.map_or(part.len(), |k| k + 1), end.is_some() || part.is_empty());
        reader.consume(taken);
        if over {
            return Ok(end.is_some());
        }
    }
}

/// A regular file as memory that the system fills as it is looked at. Errors as in [`open`].
pub fn map(path: &Path) -> Result<Bytes> {
    map_file(&open(path)?)
}

/// [`map`] of an open file.
pub fn map_file(file: &File) -> Result<Bytes> {
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: read-only and private. As with every mapped file, one that another program cuts short meanwhile ends the process with
    // a bus error; our own writers never do that: they rename whole files into place.
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(Bytes::from_owner(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bounded_and_long_lines_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        let e = read(&path, 4).unwrap_err().to_string();
        assert!(e.contains("5 bytes") && e.contains("at most 4"), "{e}");
        assert_eq!(read_to_end(&b"123"[..], 3).unwrap(), b"123");
        assert!(read_to_end(&b"1234"[..], 3).is_err());
        // (Without an end: a reader that never ends is left as well.)
        assert!(read_to_end(std::io::repeat(0), 1000).is_err());
        let long = "x".repeat(LINE as usize + 7);
        let exact = "y".repeat(LINE as usize - 1);
        std::fs::write(&path, format!("a\n{long}\n\n{exact}\nb")).unwrap();
        let mut found = Vec::new();
        for_lines(open(&path).unwrap(), |line, whole| found.push((line.len(), whole))).unwrap();
        assert_eq!(found, [(1, true), (0, true), (0, true), (exact.len(), true), (1, false)]);
        assert!(map(&path).unwrap().starts_with(b"a\nx"));
        std::fs::write(&path, b"").unwrap();
        assert!(map(&path).unwrap().is_empty());
        assert!(open(dir.path()).unwrap_err().to_string().contains("folder"));
        assert!(open_inside(dir.path(), "../a").is_err());
    }

    #[cfg(unix)]
    #[test]
    fn pipes_devices_and_links_are_refused() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
        // SAFETY: a C string that lives as long as the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        for path in [fifo.as_path(), Path::new("/dev/zero")] {
            for found in [open(path).map(drop), map(path).map(drop), read(path, 10).map(drop)] {
                let e = found.unwrap_err().to_string();
                assert!(e.contains("expected a regular file"), "{e}");
            }
        }
        assert!(append(&fifo).is_err());
        std::fs::create_dir(dir.path().join("run")).unwrap();
        let run = dir.path().join("run");
        std::fs::write(dir.path().join("victim"), b"precious").unwrap();
        symlink(dir.path().join("victim"), run.join("x.jsonl")).unwrap();
        symlink(dir.path().join("nothing"), run.join("y.jsonl")).unwrap();
        symlink(dir.path(), run.join("samples")).unwrap();
        assert_eq!(read(&run.join("x.jsonl"), 100).unwrap(), b"precious");
        for name in ["x.jsonl", "y.jsonl", "samples/victim"] {
            assert!(open_inside(&run, name).unwrap_err().to_string().contains("symbolic link"), "{name}");
            assert!(append_inside(&run, name).unwrap_err().to_string().contains("symbolic link"), "{name}");
        }
        assert!(make_inside(&run, "samples").unwrap_err().to_string().contains("symbolic link"));
        assert!(!dir.path().join("nothing").exists());
        append_inside(&run, "z.jsonl").unwrap();
        make_inside(&run, "snapshots").unwrap();
        append_inside(&run, "snapshots/a").unwrap();
        assert!(run.join("snapshots/a").is_file());
    }
}
