//! Tables as .csv files: a row a sample, a column a value.

use std::path::Path;

use ndarray::{Array2, ArrayView2};

use crate::error::{Context, Error, Result};

/// Name of the column that holds classes.
const CLASS: &str = "class";

/// Writes rows `[N, D]` under the headings `x0`, `x1` and on, with a last column `class` where there are classes. Numbers are
/// written so that the same f32 is read back.
pub fn write(path: &Path, rows: ArrayView2<'_, f32>, classes: Option<&[usize]>) -> Result<()> {
    let wrong = |e: csv::Error| Error::io(e.to_string());
    let fill = || -> Result<Vec<u8>> {
        let mut out = csv::Writer::from_writer(Vec::new());
        let heading = (0..rows.ncols()).map(|k| format!("x{k}")).chain(classes.map(|_| CLASS.to_string()));
        out.write_record(heading).map_err(wrong)?;
        for (i, row) in rows.rows().into_iter().enumerate() {
            let class = classes.and_then(|c| c.get(i)).map(ToString::to_string);
            out.write_record(row.iter().map(ToString::to_string).chain(class)).map_err(wrong)?;
        }
        out.into_inner().map_err(|e| Error::io(e.to_string()))
    };
    crate::files::write_atomic(path, &fill().with_context(|| path.display().to_string())?)
}

/// Reads a table of numbers `[N, D]`. A first row that is not all numbers is taken as headings; a column headed `class` is left
/// out. Errors name the row and column of what is no number.
pub fn read(path: &Path) -> Result<Array2<f32>> {
    let run = || -> Result<Array2<f32>> {
        let mut reader =
            csv::ReaderBuilder::new().has_headers(false).trim(csv::Trim::All).from_reader(crate::files::open(path)?);
        let (mut values, mut width, mut rows, mut left_out) = (Vec::new(), None, 0, None);
        for (line, record) in reader.records().enumerate() {
            let record = record.map_err(|e| Error::io(e.to_string()))?;
            if line == 0 && record.iter().any(|cell| cell.parse::<f32>().is_err()) {
                left_out = record.iter().position(|cell| cell == CLASS);
                continue;
            }
            let before = values.len();
            for (column, cell) in record.iter().enumerate().filter(|(k, _)| Some(*k) != left_out) {
                let value = cell.parse::<f32>().map_err(|_| {
                    Error::io(format!("line {}, column {}: `{cell}` is no number", line + 1, column + 1))
                        .hint("texts and missing values have to become numbers first, as they did for the teacher")
                })?;
                values.push(value);
            }
            width = Some(values.len() - before);
            rows += 1;
        }
        let shape = (rows, width.unwrap_or(0));
        Array2::from_shape_vec(shape, values).map_err(|e| Error::io(format!("a table of {shape:?}: {e}")))
    };
    run().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.csv");
        let rows = Array2::from_shape_fn((5, 3), |(i, j)| (i as f32 - 1.7) / (j as f32 + 3.1));
        write(&path, rows.view(), Some(&[1, 0, 1, 1, 2])).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("x0,x1,x2,class\n") && text.ends_with(",2\n"), "{text}");
        assert_eq!(read(&path).unwrap(), rows);
        write(&path, rows.view(), None).unwrap();
        assert_eq!(read(&path).unwrap(), rows);
        std::fs::write(&path, "1, 2\n3, 4.5\n").unwrap();
        assert_eq!(read(&path).unwrap(), ndarray::array![[1.0, 2.0], [3.0, 4.5]]);
        for (bad, says) in [("a,b\n1,x\n", "line 2, column 2: `x`"), ("1,2\n3\n", "fields"), ("1,2\n3,\n", "``")] {
            std::fs::write(&path, bad).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("t.csv"), "{error}");
        }
    }
}
