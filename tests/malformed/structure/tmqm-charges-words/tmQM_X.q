CSD_code = A |
He x
